"""Fixtures over the tiny models."""

import pytest
import torch
from tiny_models import CONFIGS


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=list(CONFIGS))
def family(request):
    return request.param
