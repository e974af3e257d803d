// Sound of the WebSocket call, on the audio thread: what is played, and the microphone. 48 kHz.

const TICK = 1920; // samples of 40 ms
const START = 3, MOST = 12; // ticks that wait when playing begins; beyond the most, the oldest go

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.at = 0;
    this.playing = false;
    this.port.onmessage = ({ data }) => {
      if (data === "mute") for (const tick of this.queue) tick.samples = null;
      else this.queue.push(data);
      if (this.queue.length > MOST) this.queue.splice(0, this.queue.length - START);
    };
  }

  process(_, [[out]]) {
    this.playing ||= this.queue.length >= START;
    for (let i = 0; this.playing && i < out.length; i++) {
      const tick = this.queue[0];
      if (!tick) this.playing = false;
      else {
        if (this.at === 0) this.port.postMessage(tick.number);
        if (tick.samples) out[i] = tick.samples[this.at] / 32768;
        if (++this.at >= TICK) {
          this.at = 0;
          this.queue.shift();
        }
      }
    }
    return true;
  }
}

/** Int16 at 16 kHz, 40 ms a message. */
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.out = new Int16Array(640);
    this.count = this.sum = this.summed = 0;
  }

  process([[input]]) {
    for (const value of input ?? []) {
      this.sum += value;
      if (++this.summed < 3) continue;
      this.out[this.count++] = Math.max(-1, Math.min(1, this.sum / 3)) * 32767;
      this.sum = this.summed = 0;
      if (this.count === this.out.length) {
        this.port.postMessage(this.out.slice());
        this.count = 0;
      }
    }
    return true;
  }
}

registerProcessor("player", Player);
registerProcessor("microphone", Microphone);
