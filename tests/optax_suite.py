"""Runs the test modules that Optax ships over Ada2MS in place of its own optimizers: `optax_suite.py [module ...]`.

Not a test module itself: test_jax_optax.py runs it in a process of its own, because Optax' tests of sharding need eight
devices, and others switch float64 on. Each module is compiled from the installed source, with only the tables of
optimizers exchanged; a table that is not found is an error. Prints one line of JSON for each module.
"""

import ast
import copy
import importlib
import importlib.util
import json
import os
import sys
import types
import unittest
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from ada2ms.jax import ada2ms, scale_by_ada2ms

# As in Optax' tables for adamw: its learning rates, and its default weight decay, with which the optimum is where these
# tests look for it.
KWARGS = [
    {"learning_rate": 1e-1, "weight_decay": 1e-4},
    {"learning_rate": 1e-1, "weight_decay": 1e-4, "adaptivity": 1.0, "nonfinite": "skip"},
    {"learning_rate": 1e-1, "weight_decay": 1e-4, "adaptivity": 0.7, "scope": "tensor"},
]
OPTIMIZERS = [{"opt_name": "ada2ms", "opt_kwargs": kwargs} for kwargs in KWARGS]
SCALERS = "('ada2ms', scale_by_ada2ms),"

# module: (tables to exchange, text to exchange, names of the tests to run start with)
SUITES: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "optax._src.alias_test": (
        {"_OPTIMIZERS_UNDER_TEST": OPTIMIZERS},
        {"opt_name=('sgd_mom', 'adam', 'adamw')": "opt_name=('ada2ms',)", "in ['adam', 'adamw']": "in ['ada2ms']"},
        "AliasTest",
    ),
    "optax.contrib._common_test": (
        {
            "_MAIN_OPTIMIZERS_UNDER_TEST": OPTIMIZERS,
            "_BASE_OPTIMIZERS": [{"opt_name": "ada2ms", "opt_kwargs": {"learning_rate": 1.0, "weight_decay": 1e-4}}],
        },
        {},
        "ContribTest",
    ),
    "optax._src.transform_test": (
        {},
        {"('adam', transform.scale_by_adam),": SCALERS},
        "TransformTest.test_scalers_ada",
    ),
    "optax.contrib._complex_valued_test": ({}, {"('adam', transform.scale_by_adam),": SCALERS}, "ComplexValuedTest"),
    "optax._src.float64_test": (
        {"ALL_MODULES": [("scale_by", scale_by_ada2ms, {}), *((f"a{i}", ada2ms, k) for i, k in enumerate(KWARGS))]},
        {},
        "Float64Test",
    ),
    "optax._src.sharding_test": (
        {"OPTIMIZERS": {f"ada2ms{i}": ada2ms(**k) for i, k in enumerate(KWARGS)}},
        {"jax.__version__ < '0.7.2'": "False"},  # as strings: 0.10 comes before
        "ShardingTest",
    ),
    "optax.schedules._schedule_test": ({}, {}, "ScheduleAsLearningRateTest"),
    "optax.transforms._accumulation_test": (
        {"OPTIMIZERS_TO_TEST": [*OPTIMIZERS, {"opt_name": "ada2ms", "opt_kwargs": {"mu_dtype": "float32"}}]},
        {},
        "AccumulationTest",
    ),
    "optax.transforms._combining_test": (
        {},
        {"transform.scale_by_adam(),": "scale_by_ada2ms(),"},
        "CombiningTest.test_chain",
    ),
    # The alias has one state, where that of adamw is a tuple of three.
    "optax.tree_utils._state_utils_test": (
        {},
        {"alias.adamw)": "alias.ada2ms)", "state.inner_state[0], 'mu'": "state.inner_state, 'mu'"},
        "StateUtilsTest.test_inject_hparams",
    ),
    # At adaptivity 1, since the steps of others shrink with the gradient: they reach the optimum exactly in the test,
    # and there Optax' own `normalize`, which comes first in this test, divides 0 by 0.
    "optax.contrib._sam_test": (
        {
            "_ADVERSARIAL_OPTIMIZERS_UNDER_TEST": [
                {
                    "adv_opt_name": "ada2ms",
                    "adv_opt_kwargs": {"learning_rate": 1e-4, "weight_decay": 0.0, "adaptivity": 1.0},
                }
            ]
        },
        {},
        "SAMTest",
    ),
}


def load(name: str, tables: dict[str, Any], texts: dict[str, str]) -> types.ModuleType:
    """The module, with the first assignment to each table and each text exchanged."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    with open(spec.origin) as file:
        source = file.read()
    for old, new in texts.items():
        assert old in source, f"{name}: no {old!r}"
        source = source.replace(old, new)
    tree = ast.parse(source)
    for table in tables:
        first = next(
            node
            for node in tree.body
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [table]
        )
        first.value = ast.copy_location(ast.parse(f"TABLES[{table!r}]", mode="eval").body, first.value)
    module = types.ModuleType(name)
    module.__dict__.update(__file__=spec.origin, TABLES=copy.deepcopy(tables), scale_by_ada2ms=scale_by_ada2ms)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    setattr(importlib.import_module(parent), child, module)  # for modules that import it
    exec(compile(ast.fix_missing_locations(tree), spec.origin, "exec"), module.__dict__)
    return module


def main() -> None:
    importlib.import_module("optax._src.alias").ada2ms = ada2ms  # where the tables' names are looked up
    for name, (tables, texts, prefix) in SUITES.items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        suite = unittest.TestSuite()
        for case in unittest.defaultTestLoader.loadTestsFromModule(load(name, tables, texts)):
            for test in case:  # type: ignore[union-attr]
                if test.id().removeprefix(f"{name}.").startswith(prefix):
                    suite.addTest(test)
        result = unittest.TestResult()
        suite.run(result)
        broken = [[test.id(), text] for test, text in result.failures + result.errors]
        skipped = [[test.id(), reason] for test, reason in result.skipped]
        print(json.dumps({"module": name, "run": result.testsRun, "broken": broken, "skipped": skipped}), flush=True)


if __name__ == "__main__":
    main()
