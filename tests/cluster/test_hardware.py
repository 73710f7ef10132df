"""Hardware profiles: shipped ones are valid and say where their price is from."""

from importlib.resources import files

import pytest

from cluster.errors import InputError
from cluster.hardware.profiles import load_profile

SHIPPED = [one.name.removesuffix(".yaml") for one in files("cluster.hardware").iterdir() if one.name.endswith(".yaml")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_profiles_name_price_source_and_date(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.price_source
    assert profile.price_date


def test_an_own_profile_by_its_file(tmp_path):
    text = "name: mine\ncores: 4\nmemory_gib: 1\nprice_per_hour_usd: 1\nprice_source: us\nprice_date: 2026-01\n"
    (tmp_path / "mine.yaml").write_text(text)
    assert load_profile(str(tmp_path / "mine.yaml")).cores == 4
    (tmp_path / "mine.yaml").write_text(text + "colour: red\n")
    with pytest.raises(InputError, match="colour"):
        load_profile(str(tmp_path / "mine.yaml"))


def test_unknown_profiles_list_the_known_ones():
    with pytest.raises(InputError, match="no profile abacus; there are: a100-80g, cpu-local, h100-sxm, l4"):
        load_profile("abacus")
