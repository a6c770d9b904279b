from pathlib import Path

import pytest

from tests.patches.vllm033 import SourcesUnavailable
from tests.patches.vllm033 import vllm_033_sources as find_sources


@pytest.fixture(scope="session")
def vllm_033_sources() -> Path:
    try:
        return find_sources()
    except SourcesUnavailable as error:
        pytest.skip(str(error))
