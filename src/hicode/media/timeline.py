"""One continuous clock for all tracks of a file, whatever its time stamps do.

A recording's clock may start again (joined transport streams), wrap, or jump by hours. FFmpeg hands such stamps on.
Here each jump begins a new segment, shifted so that it follows its predecessor. All tracks share the segments' shifts,
so that picture and sound stay together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import av
import av.container
import av.error
import av.packet

# A step back by more is a clock that started again: reordered frames and overlaps are shorter.
_BACK_S = 0.5
# A step ahead by more, of a track that leads all others, is a jump: pauses of variable frame rate are shorter.
_AHEAD_S = 10.0
# A track follows another into its newer segment if it then continues so exactly.
_JOIN_S = 2.0
# Pictures are decoded before they show by no more. Else one of the two stamps is damaged.
_REORDERED_S, _REORDERED_FRAMES = 1.0, 20


@dataclass
class _Track:
    expected_s: float
    segment: int


@dataclass(eq=False)
class Timeline:
    """Shifts of the segments met so far.

    jumps      (time s, size s) of each jump, on the continuous clock
    reached_s  the latest time stamp as the file has it, to compare with the length that it declares
    """

    reached_s: float = float("-inf")
    shifts_s: list[float] = field(default_factory=lambda: [0.0])
    jumps: list[tuple[float, float]] = field(default_factory=list)
    _tracks: dict[int, _Track] = field(default_factory=dict)
    _head_s: float = float("-inf")

    def shift_s(self, track: int, time_s: float, duration_s: float) -> float:
        """What to add to the time stamps of a track's next packet, in the order of the file."""
        self.reached_s = max(self.reached_s, time_s + duration_s)
        state = self._tracks.get(track)
        if state is None:
            state = self._tracks[track] = _Track(time_s, self._first_segment(time_s))
            state.expected_s += self.shifts_s[state.segment]
        elif not self._continues(state, time_s + self.shifts_s[state.segment]):
            self._change(state, time_s)
        shift = self.shifts_s[state.segment]
        state.expected_s = time_s + shift + duration_s
        self._head_s = max(self._head_s, state.expected_s)
        return shift

    def off_s(self, track: int, time_s: float) -> float:
        """How far a time stamp of the file is from what the track's last packet lets expect."""
        state = self._tracks.get(track)
        return 0.0 if state is None else abs(time_s + self.shifts_s[state.segment] - state.expected_s)

    def _first_segment(self, time_s: float) -> int:
        later = range(len(self.shifts_s) - 1, 0, -1)
        return next((k for k in later if abs(time_s + self.shifts_s[k] - self._head_s) <= _JOIN_S), 0)

    def _continues(self, state: _Track, time_s: float) -> bool:
        ahead_s = time_s - state.expected_s
        return ahead_s >= -_BACK_S and (ahead_s <= _AHEAD_S or time_s <= self._head_s + _AHEAD_S)

    def _change(self, state: _Track, time_s: float) -> None:
        others = [k for k in range(len(self.shifts_s)) if k != state.segment]
        off_s = {k: abs(time_s + self.shifts_s[k] - state.expected_s) for k in others}
        # Back into an older segment goes only who left it for a moment, by a damaged stamp.
        near = [k for k in others if off_s[k] <= (_JOIN_S if k > state.segment else _BACK_S)]
        if near:
            nearest = min(near, key=off_s.__getitem__)
        else:
            self.jumps.append((state.expected_s, time_s + self.shifts_s[state.segment] - state.expected_s))
            self.shifts_s.append(state.expected_s - time_s)
            nearest = len(self.shifts_s) - 1
        state.segment = nearest


def packets(container: av.container.InputContainer, timeline: Timeline | None = None) -> Iterator[av.packet.Packet]:
    """All packets of pictures and sound in the order of the file, their time stamps on the continuous clock.

    Those that an edit list leaves out are not of the clock: others build on them. Packets that FFmpeg cannot read end
    the file: what is missing shows in its length.
    """
    timeline, leads_s = timeline or Timeline(), {}
    source = container.demux()
    while True:
        try:
            packet = next(source, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        if packet.is_discard:
            yield packet
            continue
        _mend_stamps(packet, timeline, leads_s)
        stamp = packet.dts if packet.dts is not None else packet.pts
        if packet.stream.type not in ("video", "audio"):
            if stamp is not None and packet.time_base:
                timeline.reached_s = max(timeline.reached_s, float((stamp + (packet.duration or 0)) * packet.time_base))
            continue
        if stamp is not None and packet.time_base:
            base = packet.time_base
            shift = timeline.shift_s(packet.stream.index, float(stamp * base), float((packet.duration or 0) * base))
            if shift:
                ticks = round(shift / base)
                packet.pts = None if packet.pts is None else packet.pts + ticks
                packet.dts = None if packet.dts is None else packet.dts + ticks
        yield packet


def cut_off(container: av.container.InputContainer, reached_s: float) -> tuple[float, float] | None:
    """Seconds that are there and seconds that the file declares, where its packets end well before those."""
    declared_s, start_s = (container.duration or 0) / av.time_base, (container.start_time or 0) / av.time_base
    if container.format.name == "avi":  # FFmpeg guesses a duration from the file's size
        rates = [(s.frames, float(s.average_rate or 0)) for s in container.streams.video]
        declared_s = max([declared_s, *(frames / rate for frames, rate in rates if rate)])
    there_s = max(reached_s - start_s, 0.0)
    return (there_s, declared_s) if there_s < declared_s - max(0.5, 0.02 * declared_s) else None


def _mend_stamps(packet: av.packet.Packet, timeline: Timeline, leads_s: dict[int, Fraction]) -> None:
    """Where decoding and presentation time disagree as never before, keep the one that continues the track."""
    base, dts, pts = packet.time_base, packet.dts, packet.pts
    if dts is None or pts is None or not base:
        return
    track, usual_s = packet.stream.index, leads_s.setdefault(packet.stream.index, (pts - dts) * base)
    if abs((pts - dts) * base - usual_s) <= max(_REORDERED_S, _REORDERED_FRAMES * (packet.duration or 0) * base):
        return
    lead = round(usual_s / base)
    if timeline.off_s(track, float(dts * base)) <= timeline.off_s(track, float((pts - lead) * base)):
        packet.pts = dts + lead
    else:
        packet.dts = pts - lead


@dataclass(frozen=True)
class Span:
    """When a track begins and ends, s on the continuous clock."""

    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Extent:
    """What a pass over a file's packets shows, nothing decoded.

    spans      of each track, by its index in the file; without time stamps its packets follow one another from 0
    jumps      (time s, size s) of the clock
    """

    spans: dict[int, Span]
    jumps: list[tuple[float, float]]


def extent(container: av.container.InputContainer) -> Extent:
    """Read all packets of an opened container."""
    timeline, spans = Timeline(), {}
    for packet in packets(container, timeline):
        if not packet.time_base or packet.size == 0 or packet.is_discard:
            continue
        known = spans.get(packet.stream.index)
        stamp = packet.pts if packet.pts is not None else packet.dts
        begin = float(stamp * packet.time_base) if stamp is not None else known.end_s if known else 0.0
        end = begin + float((packet.duration or 0) * packet.time_base)
        known = known or Span(begin, end)
        spans[packet.stream.index] = Span(min(begin, known.begin_s), max(end, known.end_s))
    return Extent(spans, timeline.jumps)
