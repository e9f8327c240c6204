"""A stand-in for pytest-benchmark's fixture, with which tests run single cases."""

from __future__ import annotations

import time

from pytest_benchmark.stats import Metadata


class Benchmark:
    """As much of pytest-benchmark's fixture as `alternate` uses."""

    def __init__(self, name="test_case[2threads-forward-1M]", disabled=False):
        self.extra_info, self.disabled, self.rows, self.has_error, self.cprofile_stats = {}, disabled, [], False, None
        self.name, self.fullname, self.group, self.param, self.params = (
            name,
            f"bench/{name}",
            None,
            None,
            {"size": "1M"},
        )
        self._add_stats = self.rows.append

    def pedantic(self, function, setup=None, rounds=1, iterations=1):
        if self.disabled:
            return function()
        self.stats = Metadata(self, iterations, {})
        self._add_stats(self.stats)
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            function()
            self.stats.update(time.perf_counter() - start)
