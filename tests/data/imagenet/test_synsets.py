"""The numbers of synsets, from a file."""

import pytest

from taming.data.imagenet.synsets import give_synsets_from_indices


def test_a_file_of_synsets(tmp_path):
    file = tmp_path / "index_synset.yaml"
    file.write_text("0: n01440764\n1: n01443537\n")
    assert give_synsets_from_indices([1, 0], file) == ["n01443537", "n01440764"]
    with pytest.raises(ValueError, match="has no synset for class 2"):
        give_synsets_from_indices([2], file)


@pytest.mark.parametrize("content", [b"0: [n01440764\n1: }", b"0: n01440764 # \xff", b"0: 2020-99-99"])
def test_a_malformed_file_is_named_in_one_line(tmp_path, content):
    file = tmp_path / "index_synset.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is not valid YAML: write a line `number: syn") as caught:
        give_synsets_from_indices([0], file)
    assert "\n" not in str(caught.value)
