"""`from vlv import ...`: the public names, and that importing `vlv` loads nothing until they are used."""

import subprocess
import sys

import pytest

import configuration_vlv
import modeling_vlv
import processing_vlv
import vlv

PUBLIC = {
    "VLVConfig": configuration_vlv,
    "VLVForConditionalGeneration": modeling_vlv,
    "VLVModel": modeling_vlv,
    "VLVProcessor": processing_vlv,
    "bundled_checkpoint": None,
    "load_autoencoder": None,
    "load_captioner": None,
}


def test_all_public_names_are_there():
    assert set(vlv.__all__) == set(PUBLIC)
    assert set(PUBLIC) <= set(dir(vlv))
    for name, module in PUBLIC.items():
        assert callable(getattr(vlv, name))
        if module is not None:
            assert getattr(vlv, name) is getattr(module, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'VLVmodel'"):
        vlv.VLVmodel  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'VLVmodel'"):
        from vlv import VLVmodel  # noqa: F401


def test_importing_the_package_loads_no_torch():
    code = "import sys, vlv; vlv.bundled_checkpoint(); print('torch' in sys.modules, 'transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False False"
