import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shivelight import AdapterError, BlockRouting, DeltaConfig, RestPlan, Reuse, RoutingConfig, TokenRouting

token_routings = st.builds(
    TokenRouting,
    bottleneck=st.integers(1, 512),
    share=st.integers(1, 8),
    policy_width=st.integers(1, 256).map(lambda half: 2 * half),
    initial_keep=st.floats(0.001, 0.999),
    scores=st.sampled_from(["learned", "norm", "random"]),
    ratios=st.sampled_from(["policy", "fixed"]),
    cfg_scores=st.sampled_from(["cond", "max"]),
    seed=st.integers(0, 2**31),
)
delta_configs = st.builds(DeltaConfig, rank=st.integers(1, 256), alpha=st.floats(0.01, 512))


@settings(deadline=None, max_examples=40)
@given(st.none() | token_routings, st.none() | delta_configs)
def test_a_config_survives_json(tokens: TokenRouting | None, deltas: DeltaConfig | None) -> None:
    if tokens is None and deltas is None:
        with pytest.raises(AdapterError, match="nothing to attach"):
            RoutingConfig(tokens=None)
        return
    config = RoutingConfig(tokens=tokens, deltas=deltas)
    assert RoutingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_defaults_are_the_papers() -> None:
    config = RoutingConfig()
    assert config.tokens == TokenRouting() and config.deltas is None
    assert (config.tokens.bottleneck, config.tokens.share, config.tokens.cfg_scores) == (64, 2, "cond")
    assert DeltaConfig().rank == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bottleneck", 0), ("bottleneck", 1.5), ("bottleneck", "64"), ("bottleneck", True), ("share", 0),
        ("share", None), ("policy_width", 3), ("policy_width", 0), ("policy_width", 64.0), ("initial_keep", 0.0),
        ("initial_keep", 1.0), ("initial_keep", math.nan), ("scores", "best"), ("scores", None),
        ("scores", ["norm"]), ("ratios", "free"), ("cfg_scores", "mean"), ("seed", "zero"),
    ],
)  # fmt: skip
def test_a_bad_token_setting_names_the_field_and_the_value(name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=name) as caught:
        TokenRouting(**{name: value})
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 0),
        ("rank", 2.0),
        ("rank", "8"),
        ("alpha", 0.0),
        ("alpha", -1.0),
        ("alpha", math.nan),
        ("alpha", math.inf),
    ],
)
def test_a_bad_delta_setting_names_the_field(name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=name):
        DeltaConfig(**{name: value})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"tokens": {}, "patches": {}}, "no field patches.*newer"),
        ({"tokens": {"width": 3}}, "no field width"),
        ({"tokens": [1, 2]}, "JSON object"),
        ([], "JSON object"),
        ({"tokens": None, "deltas": None}, "nothing to attach"),
        ({"tokens": {"initial_keep": "half"}}, "TokenRouting"),
        ({}, "nothing to attach"),
    ],
)
def test_a_stored_config_that_cannot_be_read_is_refused(data: object, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        RoutingConfig.from_dict(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"), [("growth", 0.9), ("growth", math.nan), ("growth", 11.0), ("whole", "both"), ("forecast", 1.1)]
)
def test_a_bad_reuse_setting_names_the_field_and_the_value(name: str, value: object) -> None:
    with pytest.raises(AdapterError, match=f"Reuse.{name} is {value!r}"):
        Reuse(**{name: value})  # type: ignore[arg-type]


def test_reuse_survives_json_and_an_older_file_has_the_defaults_of_new_fields() -> None:
    config = RoutingConfig.training_free(compute=0.5, axis="blocks", growth=1.5, whole="residual", forecast=0.75)
    written = json.loads(json.dumps(config.to_dict()))
    assert RoutingConfig.from_dict(written) == config
    for name in ("growth", "whole"):
        del written["reuse"][name]
    assert RoutingConfig.from_dict(written).reuse == Reuse(forecast=0.75)


def test_few_steps_are_spaced_evenly_and_not_forecast() -> None:
    assert [Reuse(growth=3.0).spacing(steps) for steps in (1, 4, 6, 8, 25)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    reuse = Reuse(forecast=0.5)
    assert [reuse.horizon(steps) for steps in (1, 4, 8, 12, 16, 25)] == [0.0, 0.0, 0.0, 3.0, 8.0, 12.5]
    assert Reuse(forecast=0.0).horizon(50) == 0.0


def test_deltas_of_some_generations_alone() -> None:
    plans = (RestPlan(4, (0, 2)), RestPlan(8, (0, 3), passes=2))
    resting = RoutingConfig(
        None, BlockRouting(router="interval", widths=(1.0,)), DeltaConfig(2, 2.0, plans), Reuse(whole="output")
    )
    assert RoutingConfig.from_dict(json.loads(json.dumps(resting.to_dict()))) == resting
    assert plans[0].like(RestPlan(4, (0, 2), 2)) and not plans[0].like(RestPlan(4, (0, 3)))
    assert not plans[0].like(RestPlan(5, (0, 2)))
    with pytest.raises(AdapterError, match="DeltaConfig.plans has one plan twice"):
        DeltaConfig(plans=(plans[0], RestPlan(4, (0, 2), 2)))
    with pytest.raises(AdapterError, match="DeltaConfig.plans is 4; give a list"):
        DeltaConfig(plans=4)
    with pytest.raises(AdapterError, match="DeltaConfig.plans is about steps at which all blocks rest"):
        RoutingConfig(deltas=DeltaConfig(2, 2.0, plans))
