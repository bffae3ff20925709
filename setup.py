import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

INSTALL_REQUIRES = [
    "accelerate>=1.3.0",
    "datasets>=4.0.0",
    "diffusers>=0.36.0,<1",
    "huggingface_hub>=1.3.0,<3",
    "numpy>=2.0.0",
    "pillow>=10.1.0",
    "rich",
    "safetensors>=0.4.3",
    "torch>=2.6",
    "tqdm",
    "transformers>=5.0.0,<6",
]

EXTRAS = {
    "train": ["peft", "pyyaml", "tensorboard"],
    "evaluate": ["evaluate", "matplotlib", "pycocoevalcap", "torchmetrics"],
    "formats": ["pillow-heif", "pillow-jxl-plugin"],
    "ray": ["ray[data]"],
    "space": ["gradio"],
    "test": ["bitsandbytes", "playwright", "pytest", "pytest-timeout", "pytest-xdist", "ruff"],
}
EXTRAS["all"] = sorted({requirement for extra in EXTRAS.values() for requirement in extra})

README = ROOT / "README.md"

setup(
    name="vlv",
    version=re.search(r'^__version__ = "(.+)"$', (ROOT / "vlv" / "__init__.py").read_text(), re.MULTILINE)[1],
    description="Vision-Language-Vision: images to captions and back, as Hugging Face models",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The five files that are also published to the Hub as remote code live flat at the top.
    py_modules=["configuration_vlv", "modeling_vlv", "processing_vlv", "images_vlv", "pipeline_vlv"],
    packages=find_packages(include=["vlv", "vlv.*"]),
    package_data={"vlv": ["checkpoints/**/*", "publish/*.md"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["vlv = vlv.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
