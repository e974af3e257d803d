"""One continuous clock for all tracks of a file, whatever its time stamps do.

A recording's clock may start again (joined transport streams), wrap, or jump by hours. FFmpeg hands such stamps on.
Here each jump begins a new segment, shifted so that it follows its predecessor. All tracks share the segments' shifts,
so that picture and sound stay together.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import av
import av.container
import av.error
import av.packet

# A step back by more is a clock that started again: reordered frames and overlaps are shorter.
_BACK_S = 0.5
# A step ahead by more, of a track that leads all others, is a jump: pauses of variable frame rate are shorter.
_AHEAD_S = 10.0
# A track follows another into its segment if it then continues so exactly.
_JOIN_S = 2.0


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

    def _first_segment(self, time_s: float) -> int:
        later = range(len(self.shifts_s) - 1, 0, -1)
        return next((k for k in later if abs(time_s + self.shifts_s[k] - self._head_s) <= _JOIN_S), 0)

    def _continues(self, state: _Track, time_s: float) -> bool:
        ahead_s = time_s - state.expected_s
        return ahead_s >= -_BACK_S and (ahead_s <= _AHEAD_S or time_s <= self._head_s + _AHEAD_S)

    def _change(self, state: _Track, time_s: float) -> None:
        offsets = [abs(time_s + shift - state.expected_s) for shift in self.shifts_s]
        nearest = min(range(len(offsets)), key=offsets.__getitem__)
        if offsets[nearest] > _JOIN_S:
            self.jumps.append((state.expected_s, time_s + self.shifts_s[state.segment] - state.expected_s))
            self.shifts_s.append(state.expected_s - time_s)
            nearest = len(self.shifts_s) - 1
        state.segment = nearest


def packets(container: av.container.InputContainer, timeline: Timeline | None = None) -> Iterator[av.packet.Packet]:
    """All packets of pictures and sound in the order of the file, their time stamps on the continuous clock.

    Packets that FFmpeg cannot read end the file: what is missing shows in its length.
    """
    timeline = timeline or Timeline()
    source = container.demux(*container.streams.video, *container.streams.audio)
    while True:
        try:
            packet = next(source, None)
        except av.error.FFmpegError:
            return
        if packet is None:
            return
        stamp = packet.dts if packet.dts is not None else packet.pts
        if stamp is not None and packet.time_base:
            base = packet.time_base
            shift = timeline.shift_s(packet.stream.index, float(stamp * base), float((packet.duration or 0) * base))
            if shift:
                ticks = round(shift / base)
                packet.pts = None if packet.pts is None else packet.pts + ticks
                packet.dts = None if packet.dts is None else packet.dts + ticks
        yield packet


@dataclass(frozen=True)
class Span:
    """When a track begins and ends, s on the continuous clock."""

    begin_s: float
    end_s: float


@dataclass(frozen=True)
class Extent:
    """What a pass over a file's packets shows, nothing decoded.

    spans      of each track with time stamps, by its index in the file
    jumps      (time s, size s) of the clock
    """

    spans: dict[int, Span]
    jumps: list[tuple[float, float]]


def extent(container: av.container.InputContainer) -> Extent:
    """Read all packets of an opened container."""
    timeline, spans = Timeline(), {}
    for packet in packets(container, timeline):
        if packet.pts is None or not packet.time_base or packet.size == 0:
            continue
        begin = float(packet.pts * packet.time_base)
        end = begin + float((packet.duration or 0) * packet.time_base)
        known = spans.get(packet.stream.index, Span(begin, end))
        spans[packet.stream.index] = Span(min(begin, known.begin_s), max(end, known.end_s))
    return Extent(spans, timeline.jumps)
