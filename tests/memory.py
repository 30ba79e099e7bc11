"""What a step allocates, to the byte."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_allocated(step: Callable[[], object]) -> int:
    """Bytes of torch's CPU memory at the peak of a step, beyond what was there before; not of the process, whose allocator
    holds on to some."""
    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    kineto = profiler.profiler
    assert kineto is not None and kineto.kineto_results is not None
    now = peak = 0
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak
