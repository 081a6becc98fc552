from codesign.report.labels import Labels, differing, parts
from tests.report.recorded import config

BASELINE = config()


def test_the_unmodified_configuration_is_called_so() -> None:
    assert Labels(BASELINE, [BASELINE]).of(config()) == "unmodified"


def test_a_label_names_what_differs_and_nothing_else() -> None:
    made = config("int4", batch=32)

    assert Labels(BASELINE, [BASELINE, made]).of(made) == "weights int4 (group_size 64) · max_batch_size 32"


def test_a_flag_is_named_as_it_is_written() -> None:
    baseline, made = ({**config(), "kernels": {"fused": value}} for value in (False, True))

    assert Labels(baseline, [baseline, made]).of(made) == "kernels.fused true"
    assert Labels(baseline, [baseline, made]).of(baseline) == "unmodified"


def test_only_knobs_that_vary_in_the_study_are_named_when_a_choice_has_many() -> None:
    few, many = config(policy="h2o", kv_budget=0.1), config(policy="h2o", kv_budget=0.4)
    for plain in (few, many):
        plain["kv"]["policy"] |= {"recent_fraction": 0.5}

    assert Labels(BASELINE, [few, many]).of(few) == "kv.policy h2o (kv_budget 0.1)"
    assert Labels(BASELINE, [few]).of(few) == "kv.policy h2o"


def test_labels_of_different_configurations_differ() -> None:
    made = [
        config(weights, policy, batch=batch, group_size=group, kv_budget=budget)
        for weights in ("native", "int4")
        for policy in ("full", "h2o")
        for batch in (1, 8)
        for group in (32, 64)
        for budget in (0.1, 0.2)
    ]
    labels = Labels(BASELINE, made)
    different = {repr(plain): labels.of(plain) for plain in made}

    assert len(set(different.values())) == len(different)


def test_without_a_baseline_the_choices_are_named() -> None:
    label = Labels(None, [config("int8")]).of(config("int8"))

    assert "weights int8" in label
    assert "kv.policy full" in label


def test_a_family_choice_is_one_part() -> None:
    assert parts(config())["kv.policy"] == {"name": "full"}
    assert differing(config("int4"), config("int8")) == ("weights",)
