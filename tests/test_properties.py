"""Properties that hold for any input: merging, words of a command line, renumbering, filters, orders."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from taming.config import ConfigError, load_config, override_config, safe_config, storable
from taming.config_limits import resolvers_in, without_resolvers
from taming.modules.transformer import permuter
from taming.modules.vqvae.quantize import VectorQuantizer2
from taming.sampling import filter_logits

KEYS = st.sampled_from(["a", "b", "model", "params", "x_1"])
LEAVES = st.one_of(
    st.integers(-(10**9), 10**9), st.booleans(), st.none(), st.text("abc _-.", max_size=5),
    st.floats(allow_nan=False, allow_infinity=False),
)
TREES = st.dictionaries(KEYS, st.recursive(
    LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
), max_size=4)
FEW = settings(max_examples=60, deadline=None)


def merged(one, other):
    """Mappings are merged key by key; anything else is replaced."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one | {key: merged(one[key], value) if key in one else value for key, value in other.items()}
    return other


@FEW
@given(st.lists(TREES, min_size=1, max_size=3))
def test_files_are_merged_key_by_key(tmp_path_factory, trees):
    folder = tmp_path_factory.mktemp("merge")
    for number, tree in enumerate(trees):
        OmegaConf.save(OmegaConf.create(tree), folder / f"{number}.yaml")
    expected: dict = {}
    for tree in trees:
        expected = merged(expected, tree)
    try:
        found = load_config(sorted(folder.iterdir()))
    except ConfigError as error:  # a list and a mapping do not merge
        assert "does not fit what was loaded before it" in str(error)
        return
    assert OmegaConf.to_container(found) == expected
    assert OmegaConf.to_container(load_config(sorted(folder.iterdir()) * 2)) == expected or len(trees) > 1


@FEW
@given(TREES)
def test_what_is_stored_is_what_is_loaded(tree):
    assert storable(safe_config(tree, "x")) == tree
    assert storable(OmegaConf.create(storable(tree))) == tree


@FEW
@given(st.lists(KEYS, min_size=1, max_size=3), st.integers(-99, 99))
def test_a_word_sets_one_key(keys, value):
    word = f"{'.'.join(keys)}={value}"
    found = OmegaConf.to_container(override_config(OmegaConf.create({"kept": 1}), [word]))
    assert found.pop("kept") == 1
    for key in keys:
        assert list(found) == [key]
        found = found[key]
    assert found == value


@settings(max_examples=200, deadline=None)
@given(st.text("abk.=[]{}:,'\"$\\ 1-\n", max_size=14))
def test_any_word_is_a_setting_or_one_line(word):
    try:
        override_config(OmegaConf.create({}), [word])
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1


@settings(max_examples=500, deadline=None)
@example(r"${a:\${a:}}")
@example(r"${a:q,\${a:1}}")
@example("${a:'\\${a:1}'}")
@example(r"${\${:${:")
@given(st.lists(st.sampled_from(["${", "}", "oc.env", ":", "a", ".", "\\", "{"]), max_size=10).map("".join))
def test_no_resolver_is_left_in_any_text(text):
    calls = []
    OmegaConf.register_new_resolver("a", lambda *_: calls.append(1) or "x", replace=True)
    OmegaConf.register_new_resolver("oc.env.a", lambda *_: calls.append(1) or "x", replace=True)
    try:
        tree = without_resolvers({"k": text, "a": "b"})
        try:
            OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
        except Exception:  # broken interpolations
            pass
        assert not calls
        assert without_resolvers(tree) == tree or not resolvers_in(text)
    finally:
        OmegaConf.clear_resolver("a")
        OmegaConf.clear_resolver("oc.env.a")


@FEW
@given(st.lists(st.integers(0, 15), min_size=1, unique=True), st.sampled_from(["extra", 0, "random"]))
def test_renumbered_codes_come_back(tmp_path_factory, used, unknown):
    import numpy as np

    file = tmp_path_factory.mktemp("remap") / "used.npy"
    np.save(file, np.array(used))
    quantizer = VectorQuantizer2(16, 2, 0.25, remap=str(file), unknown_index=unknown)
    codes = torch.arange(16)
    new = quantizer.remap_to_used(codes)
    assert quantizer.re_embed == len(used) + (unknown == "extra")
    assert int(new.min()) >= 0 and int(new.max()) < quantizer.re_embed
    back = quantizer.unmap_to_all(new)
    assert all(int(back[code]) == code for code in used)


@FEW
@given(
    st.lists(st.floats(-20, 20), min_size=2, max_size=12), st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.floats(0.01, 1.0)), st.one_of(st.none(), st.floats(0.0, 1.0)),
)
def test_filters_keep_the_most_likely_and_change_no_logit(values, top_k, top_p, min_p):
    logits = torch.tensor([values])
    top_k = None if top_k is None else min(top_k, len(values))
    found = filter_logits(logits.clone(), top_k=top_k, top_p=top_p, min_p=min_p)
    kept = found > -torch.inf
    assert torch.equal(found[kept], logits[kept])
    assert kept[0, logits.argmax()]
    if (~kept).any():
        assert logits[~kept].max() <= logits[kept].min(), "what is kept is at least as likely as what is not"
    if top_k is not None:
        assert int(kept.sum()) <= max(top_k, int((logits >= logits.topk(top_k).values.min()).sum()))
    if top_k is top_p is min_p is None:
        assert kept.all()
    again = filter_logits(found.clone(), top_k=top_k, top_p=None, min_p=min_p)
    assert torch.equal(again > -torch.inf, kept)


@FEW
@given(st.sampled_from(["ZCurve", "SpiralOut", "SpiralIn", "AlternateParsing", "Random"]), st.integers(1, 9),
       st.integers(1, 9))
def test_orders_are_permutations_and_come_back(name, height, width):
    order = getattr(permuter, name)(height, width)
    x = torch.arange(height * width)[None].repeat(2, 1)
    assert torch.equal(order(order(x), reverse=True), x)
    assert torch.equal(order(order(x, reverse=True)), x)
    assert sorted(order(x)[0].tolist()) == list(range(height * width))


@FEW
@given(st.integers(0, 3), st.integers(1, 3), st.booleans())
def test_subsampling_takes_sides_of_powers_of_two(power, factor, tall):
    short, long = 2**power, 2**power * factor
    order = permuter.Subsample(*((long, short) if tall else (short, long)))
    x = torch.arange(short * long)[None]
    assert torch.equal(order(order(x), reverse=True), x)
