"""Which moments come, and what becomes of them: against an oracle of its own, through changes of daylight-saving."""

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jobs.due import ON_TIME, due, is_alive, moments_between, next_moment
from jobs.records import Attempt, Progress, Started

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Tokyo", "UTC")
MINUTE = timedelta(minutes=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def values(field: str, low: int, high: int) -> set[int]:
    """What a simple field allows: *, */n, n, n,m."""
    if field.startswith("*"):
        return set(range(low, high + 1, int(field[2:] or 1)))
    return {int(part) for part in field.split(",")}


def oracle(cron: str, zone: str, after: datetime, until: datetime) -> set[datetime]:
    """Debian's cron, minute by minute. Fixed hours: by the local calendar, a skipped time comes when the gap ends, a
    doubled one the first time. With * in minutes or hours: by elapsed time."""
    minute, hour, _, _, weekday = cron.split()
    minutes, hours, weekdays = values(minute, 0, 59), values(hour, 0, 23), values(weekday, 0, 6)
    place = ZoneInfo(zone)

    def matches(local: datetime) -> bool:
        return local.minute in minutes and local.hour in hours and local.isoweekday() % 7 in weekdays

    found = set()
    if minute.startswith("*") or hour.startswith("*"):
        moment = after.replace(second=0) + MINUTE
        while moment <= until:
            if matches(moment.astimezone(place)):
                found.add(moment)
            moment += MINUTE
        return found
    local = (after - timedelta(days=1)).astimezone(place).replace(tzinfo=None, second=0, fold=0)
    last = (until + timedelta(days=1)).astimezone(place).replace(tzinfo=None)  # a doubled hour's clock runs behind
    while local <= last:
        if matches(local):
            real = local
            while real.replace(tzinfo=place).astimezone(UTC).astimezone(place).replace(tzinfo=None) != real:
                real += MINUTE
            moment = real.replace(tzinfo=place, fold=0).astimezone(UTC)
            if after < moment <= until:
                found.add(moment)
        local += MINUTE
    return found


@pytest.mark.parametrize(
    ("cron", "zone", "day", "moments"),
    [
        # the doubled hour: once, in its first pass
        ("30 2 * * *", "Europe/Berlin", "2026-10-25", ["2026-10-25T00:30"]),
        ("30 1 * * *", "America/New_York", "2026-11-01", ["2026-11-01T05:30"]),
        # the skipped hour: right after it
        ("30 2 * * *", "Europe/Berlin", "2027-03-28", ["2027-03-28T01:00"]),
        ("30 2 * * *", "America/New_York", "2027-03-14", ["2027-03-14T07:00"]),
        ("15,45 2 * * *", "Europe/Berlin", "2027-03-28", ["2027-03-28T01:00"]),
        # every hour: by elapsed time, 25 of them and 23
        ("0 * * * *", "Europe/Berlin", "2026-10-25", None),
        ("0 * * * *", "America/New_York", "2027-03-14", None),
    ],
)
def test_days_on_which_clocks_change(cron, zone, day, moments):
    begin = datetime.fromisoformat(day).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC) - MINUTE
    end = (datetime.fromisoformat(day) + timedelta(days=1)).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC) - MINUTE
    found = moments_between(cron, zone, begin, end)
    if moments is None:
        assert len(found) == (25 if day.startswith("2026") else 23)
        assert all(b - a == timedelta(hours=1) for a, b in itertools.pairwise(found))
    else:
        assert found == [utc(one) for one in moments]


@st.composite
def expressions(draw):
    minute = draw(st.sampled_from(["0", "30", "15,45", "59", "*/20", "0,30"]))
    hour = draw(st.sampled_from(["1", "2", "3", "2,3", "1,2", "0", "23", "*", "*/2"]))
    return f"{minute} {hour} * * {draw(st.sampled_from(['*', '0', '0,1']))}"


CHANGES = [
    utc(one)
    for one in ("2026-10-25T01:00", "2026-11-01T06:00", "2027-03-14T07:00", "2027-03-28T01:00", "2026-10-03T15:30")
]


@settings(max_examples=40, deadline=None)
@given(expressions(), st.sampled_from(ZONES), st.sampled_from(CHANGES), st.integers(-2000, 0), st.integers(0, 2000))
def test_moments_are_those_of_debians_cron(cron, zone, change, before, behind):
    assume(
        zone != "Australia/Lord_Howe" or "*" not in "".join(cron.split()[:2])
    )  # half an hour's change: see moments_between
    after, until = change + before * MINUTE, change + behind * MINUTE
    assert moments_between(cron, zone, after, until) == sorted(oracle(cron, zone, after, until))


@settings(max_examples=100, deadline=None)
@given(
    expressions(),
    st.sampled_from(ZONES),
    st.sampled_from(CHANGES),
    st.lists(st.integers(-180_000, 180_000), min_size=2, max_size=12, unique=True),
)
def test_however_time_is_cut_no_moment_is_doubled_or_lost(cron, zone, change, cuts):
    times = [change + timedelta(seconds=one) for one in sorted(cuts)]
    pieces = [one for a, b in itertools.pairwise(times) for one in moments_between(cron, zone, a, b)]
    whole = moments_between(cron, zone, times[0], times[-1])
    assert pieces == whole
    assert len(set(whole)) == len(whole)
    if whole:
        assert next_moment(cron, zone, times[0]) == whole[0]


@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/New_York"])
@pytest.mark.parametrize("begin", ["2026-09-01T00:00", "2027-02-01T00:00"])
def test_three_months_at_three_o_clock(zone, begin):
    """Looked at every five minutes through a change of clocks: each local day once, at its time."""
    now, seen = utc(begin), utc(begin)
    fired = []
    while now < utc(begin) + timedelta(days=92):
        now += timedelta(minutes=5)
        for one in due(moments_between("30 2 * * *", zone, seen, now), "once", now):
            assert one.missed == 0
            fired.append(one.at)
            seen = one.at
    local = [one.astimezone(ZoneInfo(zone)) for one in fired]
    days = [one.date() for one in local]
    assert days == sorted(set(days))
    assert (days[-1] - days[0]).days + 1 == len(days) >= 91
    assert {one.strftime("%H:%M") for one in local} <= {"02:30", "03:00"}
    assert sum(one.strftime("%H:%M") == "03:00" for one in local) == (1 if begin.startswith("2027") else 0)


def test_missed_moments_go_by_the_policy():
    days = [utc("2026-10-20T01:00") + timedelta(days=one) for one in range(4)]
    late, on_time = days[-1] + ON_TIME + MINUTE, days[-1] + MINUTE
    assert [(one.at, one.runs, one.missed) for one in due(days, "all", late)] == [(day, True, 0) for day in days]
    assert [(one.at, one.runs, one.missed) for one in due(days, "once", late)] == [(days[-1], True, 3)]
    assert [(one.at, one.runs, one.missed) for one in due(days, "skip", late)] == [(days[-1], False, 3)]
    assert [(one.at, one.runs, one.missed) for one in due(days, "skip", on_time)] == [(days[-1], True, 3)]
    for policy in ("all", "once", "skip"):
        assert due([], policy, late) == []


@pytest.mark.parametrize(
    ("cluster", "told", "minutes", "alive"),
    [
        ("embedded", False, 9, True),
        ("embedded", False, 11, False),
        ("http://head:8265", False, 5000, True),
        ("embedded", True, 0, True),
        ("http://head:8265", True, 2, False),
    ],
)
def test_which_attempts_are_to_be_reckoned_with(cluster, told, minutes, alive):
    at = utc("2026-11-24T12:00")
    started = Started(run="r", number=1, tenant="t", name="n", by="b", cluster=cluster, at=at)
    attempt = Attempt(started=started, progress=Progress(at=at) if told else None, ended=None)
    assert is_alive(attempt, at + minutes * MINUTE) is alive
