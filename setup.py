"""Package metadata; the exact versions that `make` installs are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="homer_triton",
    version="0.2.0.dev0",
    description="Long contexts on pre-trained Llama models without training, in Triton",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # homer_triton/kernels and homer_triton/model are links to the top-level folders; a wheel holds
    # real files.
    packages=find_packages(include=["homer_triton", "homer_triton.*"]),
    package_data={
        "homer_triton": [
            "py.typed",
            "demo/words.txt",
            "demo/checkpoint/*",
            "demo/real_model.json",
            "demo/text_checkpoint/*",
            "evaluation/*.html",
            "kernels/*.json",
            "serving/*.html",
        ]
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=5.0",
        "safetensors>=0.4.3",
        # These come with transformers, and are imported here too.
        "huggingface_hub",
        "tqdm",
        "typer",
    ],
    extras_require={
        "dev": [
            "bm25s>=0.2.6",
            "fastapi>=0.115",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "mypy>=1.13",
            "openai>=1.50",
            "prometheus-client>=0.20",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "torchao>=0.18",
            "uvicorn>=0.30",
        ],
        # What `homer eval` can use; lm_eval and what it needs are some 600 MB.
        "eval": ["bm25s>=0.2.6", "lm_eval>=0.4.13"],
        "plots": ["matplotlib>=3.8"],
        # Weights of fewer bits: `homer_triton.load(..., quantize="int8")`.
        "quantized": ["torchao>=0.18"],
        # `homer serve`.
        "serve": ["fastapi>=0.115", "prometheus-client>=0.20", "uvicorn>=0.30"],
    },
    entry_points={"console_scripts": ["homer=homer_triton.cli:main"]},
)
