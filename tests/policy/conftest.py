"""Fixtures for the tiny models."""

import pytest
from tiny_models import SHARING


@pytest.fixture(params=SHARING)
def family(request):
    return request.param
