"""The loss and its gradient in plain Python loops over float64 numbers; shares nothing with the package."""

import math


def oracle(student, teacher, kappa=0.01, eps=1e-5):
    """Per-feature losses and the gradient of their sum with respect to the student, as nested lists."""
    rows, features = len(student), len(student[0])
    mean_s, std_s, z_s = _standardise(student, eps)
    _, _, z_t = _standardise(teacher, eps)
    losses = [0.0] * features
    grad_z = [[0.0] * features for _ in range(rows)]
    for i in range(features):
        for j in range(features):
            p = math.fsum(z_t[b][i] * z_s[b][j] for b in range(rows)) / rows
            losses[j] += (p - 1) ** 2 if i == j else kappa * p**2
            dp = 2 * (p - 1) if i == j else 2 * kappa * p
            for b in range(rows):
                grad_z[b][j] += dp * z_t[b][i] / rows
    grad = [[0.0] * features for _ in range(rows)]
    for j in range(features):
        # z = c / (std + eps) with c = x - mean: std moves with every x, and so does the mean.
        std = std_s[j]
        dstd = -math.fsum(grad_z[b][j] * (student[b][j] - mean_s[j]) for b in range(rows)) / (std + eps) ** 2
        dc = [
            grad_z[b][j] / (std + eps) + (dstd * (student[b][j] - mean_s[j]) / (rows * std) if std else 0.0)
            for b in range(rows)
        ]
        mean_dc = math.fsum(dc) / rows
        for b in range(rows):
            grad[b][j] = dc[b] - mean_dc
    return losses, grad


def _standardise(x, eps):
    rows, features = len(x), len(x[0])
    mean = [math.fsum(x[b][j] for b in range(rows)) / rows for j in range(features)]
    std = [math.sqrt(math.fsum((x[b][j] - mean[j]) ** 2 for b in range(rows)) / rows) for j in range(features)]
    z = [[(x[b][j] - mean[j]) / (std[j] + eps) for j in range(features)] for b in range(rows)]
    return mean, std, z
