"""How many pictures a reader with a clock gets where the machine is too slow for 25 a second."""

WINDOW = 25
"""Frames that are judged together: a second."""
MOST_LATE = 4
"""Late frames in a window that are no reason to change."""
MOST_PATIENCE = 32


class PictureRate:
    """Which frames get a picture of their own: each, every second or every third. Between them the last one stays.

    Rendering all frames on a machine that is too slow makes most of them late, so that work is thrown away and sound
    and ticks are delayed. Fewer pictures come evenly and in time. After calm windows the rate rises again; each time
    that this was too early, it takes twice as many.
    """

    def __init__(self):
        self.every = 1
        self._number = self._frames = self._late = self._calm = 0
        self._patience = 4

    def own_picture(self) -> bool:
        """Whether the next frame is rendered."""
        self._number += 1
        return self._number % self.every == 0

    def shown(self, late: bool) -> None:
        """A spoken frame was handed out, with its picture or without it."""
        self._frames += 1
        self._late += late
        if self._late > MOST_LATE:
            if self.every < 3:
                self.every += 1
                self._patience = min(2 * self._patience, MOST_PATIENCE)
            self._frames = self._late = self._calm = 0
        elif self._frames == WINDOW:
            self._calm += 1
            self._frames = self._late = 0
            if self._calm >= self._patience and self.every > 1:
                self.every, self._calm = self.every - 1, 0
