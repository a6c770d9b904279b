"""What the build needs code for; all metadata is in pyproject.toml."""

from setuptools import setup

# The compiled CPU kernels are declared here (ext_modules) once they exist.
setup()
