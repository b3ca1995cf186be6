import subprocess
import sys

import pytest

import mm_hf


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.distributed
def test_import_of_the_package_does_not_import_transformers():
    heavy = "['transformers', 'datasets', 'accelerate', 'evaluate', 'matplotlib', 'sklearn', 'torchmetrics']"
    assert python(f"import sys, mm_hf; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"
    code = f"import sys; from mm_hf import multimix_loss; print([m for m in {heavy} if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_all_public_names_exist():
    for name in mm_hf.__all__:
        assert getattr(mm_hf, name) is not None
    assert set(mm_hf.__all__) <= set(dir(mm_hf))
    with pytest.raises(AttributeError, match="has no attribute 'MultiMax'"):
        _ = mm_hf.MultiMax
