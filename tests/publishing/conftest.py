"""Someone who publishes."""

import pytest
from fake_hub import fake_hub
from hub_user import User


@pytest.fixture(scope="session")
def inhabitant(tmp_path_factory):
    with fake_hub() as hub:
        user = User(hub, tmp_path_factory.mktemp("user") / "home")
        yield user
        user.leave()


@pytest.fixture
def user(inhabitant):
    """A [`User`] whose machine and Hub are empty."""
    inhabitant.start_over()
    return inhabitant
