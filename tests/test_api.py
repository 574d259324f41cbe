"""The public interface, pinned."""

import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import rsd_loss

SIGNATURES = {
    "rsd_loss": "(student, teacher, *, kappa=0.01, eps=1e-05, reduction='sum', gather_distributed=False, "
    "process_group=None, implementation='auto', return_terms=False)",
    "RSDLoss": "(*, kappa=0.01, eps=1e-05, reduction='sum', gather_distributed=False, process_group=None, "
    "implementation='auto', return_terms=False)",
    "DecouplingProjector": "(in_features, out_features, *, expansion=2, device=None, dtype=None)",
    "cross_correlation": "(student, teacher, *, eps=1e-05, gather_distributed=False, process_group=None)",
    "RSDTerms": "(invariance, decorrelation)",
    "features.pool": "(x, *, prefix_tokens=0, channels_last=None)",
    "features.dense_pairs": "(student, teacher, *, prefix_tokens=0, grid=None, channels_last=None)",
    "diagnostics.Summary": "(mean_diagonal, off_diagonal_rms, effective_rank, linear_cka, redundancy)",
    "diagnostics.summary": "(student, teacher, *, eps=1e-05)",
    "diagnostics.redundancy": "(teacher, *, eps=1e-05)",
}


def test_names():
    assert sorted(rsd_loss.__all__) == sorted(
        [name for name in SIGNATURES if "." not in name] + ["diagnostics", "features"]
    )
    assert re.fullmatch(r"\d+\.\d+\.\d+", rsd_loss.__version__)


def test_signatures():
    for name, want in SIGNATURES.items():
        value = rsd_loss
        for part in name.split("."):
            value = getattr(value, part)
        parameters = inspect.signature(value).parameters.values()
        bare = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert str(bare) == want, name
        typing.get_type_hints(value.__init__ if isinstance(value, type) else value)  # tools resolve these by name


def test_every_public_name_is_documented():
    for name in SIGNATURES:
        value = rsd_loss
        for part in name.split("."):
            value = getattr(value, part)
        assert len(value.__doc__.splitlines()) > 3, name


def test_import_is_light():
    """Nothing but torch and einops comes in: Triton in particular only on use."""
    code = (
        "import sys, torch; before = set(sys.modules); import rsd_loss; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert set(eval(out)) <= {"einops", "rsd_loss", "torch"}


def test_citation_has_the_version():
    text = (Path(__file__).parents[1] / "CITATION.cff").read_text()
    assert f"version: {rsd_loss.__version__}\n" in text
