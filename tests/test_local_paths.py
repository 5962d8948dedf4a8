"""Names in place of paths of this machine, and the search for such paths."""

import pytest

from llamagen_hf.local_paths import find_local_path, is_hub_id, public_name, public_sources, unless_folder


@pytest.mark.parametrize(
    "text, place",
    [
        ('{"seen": "/home/me"}', "/home/me"),
        ("file:///home/me/x", "/home/me"),
        ("a line\\n/data/images", "/data"),
        ("/home/medium", None),
        ("user/data/x and https://there.org/data/x", None),
        ('{"Ġ/data": 7, "/data": 8, "/data/": 9}', None),
    ],
)
def test_what_a_path_of_this_machine_is(text, place):
    assert find_local_path(["nothing", text], ["/home/me", "/data"]) == place


@pytest.mark.parametrize(
    "source, name",
    [
        ("user/dataset", "user/dataset"),
        ("/data/images", "images"),
        ("./images", "images"),
        ("~/images", "images"),
        ("shards/{00000..00009}.tar", "{00000..00009}.tar"),
        ("cifar10", "cifar10"),
    ],
)
def test_public_names(source, name):
    assert public_name(source) == name


def test_a_folder_here_is_not_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("user/model") and public_name("user/model") == unless_folder("user/model") == "user/model"
    (tmp_path / "user" / "model").mkdir(parents=True)
    assert not is_hub_id("user/model") and public_name("user/model") == "model" and unless_folder("user/model") is None
    assert not is_hub_id(None) and not is_hub_id("emoji") and not is_hub_id("./model")
    assert public_name(".") == tmp_path.name and unless_folder(tmp_path) is None


def test_settings_keep_all_but_their_sources():
    settings = {"_name_or_path": "/data/model", "dataset": "user/images", "tokenizer": None, "note": "/data/model"}
    assert public_sources(settings) == settings | {"_name_or_path": "model"}
    assert public_sources({"_name_or_path": ""}) == {"_name_or_path": ""}
