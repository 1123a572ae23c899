"""What is noted of experts, and the lives that it comes to."""

from __future__ import annotations

import pytest

from cmoe.timeline import Timeline


def lives(timeline, present, **more):
    made = timeline.lives(present, more.get("used", {}), more.get("tasks", {}))
    return {(life.layer, life.expert): life for life in made}


def test_a_life_is_told_by_its_events():
    t = Timeline()
    t.add("upcycled", "a", [0, 1], 1)
    t.add("frozen", "a", [0, 1], 2)
    t.add("thawed", "a", [0], 3)
    t.add("frozen", "a", [0], 4)
    t.add("merged", "a", [0, 1], 4, after=True, into=2)
    t.add("added", "a", [2], 4, after=True)
    t.add("assigned", "a", [2], 4)
    t.add("removed", "b", [7], 2, after=True)
    t.add("collapsed", "c", [0], 3, after=True)
    t.add("removed", "a", [], 1)  # of no expert
    found = lives(t, {"a": [2], "d": [5]}, used={("a", 2): {4: 0.5}}, tasks={("a", 2): (0, 4)})
    assert len(t.events) == 9
    first = found["a", 0]
    assert (first.added, first.origin, first.ended, first.how, first.into) == (1, "upcycled", 5, "merged", 2)
    assert first.frozen == ((2, 3), (4, None))
    assert found["a", 1].frozen == ((2, None),)
    assert (found["a", 2].added, found["a", 2].ended, found["a", 2].tasks) == (5, None, (0, 4))
    assert found["a", 2].used == {4: 0.5}
    assert (found["b", 7].added, found["b", 7].ended, found["b", 7].how) == (0, 3, "removed")
    assert found["c", 0].how == "collapsed"
    assert (found["d", 5].added, found["d", 5].ended) == (0, None)  # nobody spoke of it


def test_frozen_and_thawed_at_once_is_nothing():
    t = Timeline()
    t.add("frozen", "a", [0], 1)
    t.add("thawed", "a", [0], 1)
    assert lives(t, {"a": [0]})["a", 0].frozen == ()


def test_events_of_runs_from_before_say_when_they_were():
    t = Timeline([{"kind": k, "layer": "a", "experts": [0], "experience": 2} for k in ("frozen", "removed")])
    assert lives(t, {})["a", 0].frozen == ((2, None),)
    assert lives(t, {})["a", 0].ended == 3


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match=r"event: expected one of .*'merged'.*, got 'died'"):
        Timeline().add("died", "a", [0], 0)
