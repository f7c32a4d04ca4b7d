"""Metadata is in pyproject.toml; here is only what it cannot say: packages, and the data files that belong to them."""

from glob import glob

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["scfeat_core", "scfeat_core.*", "scfeat_ros", "scfeat_ros.*"]),
    package_data={"scfeat_core": ["weights/*.safetensors", "weights/*.safetensors.*", "weights/*.md", "py.typed"]},
    # Where ament puts them as well: share/scfeat below the prefix.
    data_files=[
        ("share/scfeat/config", sorted(glob("config/*"))),
        ("share/scfeat/launch", sorted(glob("launch/*.py"))),
    ],
)
