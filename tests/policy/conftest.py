"""Fixtures over the tiny models."""

import pytest
from tiny_models import CONFIGS


@pytest.fixture(params=list(CONFIGS))
def family(request):
    return request.param
