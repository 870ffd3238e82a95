"""The table of tuners has every kind of peft and every key of its configs."""

from __future__ import annotations

import dataclasses

from adapterhub_converters.adapter import TUNERS
from adapterhub_converters.formats.peft.adapter_config import INERT, KINDS, READ, REASONS
from tests.conftest import need_module


def test_every_kind_of_peft_is_merged_or_refused_with_a_reason() -> None:
    need_module("peft")
    import peft

    merged = {"LORA", "ADALORA", "LOHA", "LOKR", "VERA", *TUNERS}
    assert merged | REASONS.keys() == {peft_type.value for peft_type in peft.PeftType}


def test_the_table_has_every_key_of_pefts_configs() -> None:
    need_module("peft")
    import peft

    for peft_type, tuner in TUNERS.items():
        fields = {field.name for field in dataclasses.fields(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)])}
        assert fields - INERT - READ <= KINDS[peft_type], tuner.method
        for key, default in tuner.numbers.items():
            default_config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(peft_type)]()
            assert getattr(default_config, key) == default, f"{tuner.method}: {key}"
