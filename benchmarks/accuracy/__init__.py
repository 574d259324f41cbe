"""Does it distil: training runs with the loss and with other methods, and their tables and plots."""
