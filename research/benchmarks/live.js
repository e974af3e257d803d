// What the page shows and plays, by the page's own clock (ms). Put into the page by research.benchmarks.live.

(() => {
  const CELL = 16, BITS = 18;
  const peers = [];
  const Peer = window.RTCPeerConnection;
  window.RTCPeerConnection = class extends Peer {
    constructor(...options) { super(...options); peers.push(this); }
  };

  const live = (window.live = { shown: [], loud: [], peers });
  const canvas = new OffscreenCanvas(CELL * BITS, CELL);
  const context = canvas.getContext("2d", { willReadFrequently: true });

  function read(video) {
    const { videoWidth, videoHeight } = video;
    if (videoWidth < CELL * BITS) return null;
    context.drawImage(video, 0, videoHeight - CELL, CELL * BITS, CELL, 0, 0, CELL * BITS, CELL);
    const { data } = context.getImageData(0, CELL / 2, CELL * BITS, 1);
    const bit = (k) => (data[4 * (k * CELL + CELL / 2)] > 128 ? 1 : 0);
    const number = (from, count) => Array.from({ length: count }, (_, k) => bit(from + k) << k).reduce((a, b) => a + b);
    return { tick: number(0, 12), cleared: number(12, 4), speech: bit(16), loud: bit(17) };
  }

  live.watch = () => {
    const video = document.getElementById("video");
    let last = null;
    const step = (_, metadata) => {
      const stamp = read(video);
      if (stamp && JSON.stringify(stamp) !== last) {
        last = JSON.stringify(stamp);
        live.shown.push({ at: metadata.expectedDisplayTime, ...stamp });
        if (live.shown.length > 20000) live.shown.shift();
      }
      video.requestVideoFrameCallback(step);
    };
    video.requestVideoFrameCallback(step);
  };

  /** Beeps that are played: onsets by the sound's own clock. */
  live.hear = () => {
    const video = document.getElementById("video");
    const audio = (live.audio = new AudioContext());
    const source = audio.createMediaStreamSource(video.srcObject);
    const node = audio.createScriptProcessor(256, 1, 1);
    let quiet = 0;
    node.onaudioprocess = ({ inputBuffer, playbackTime }) => {
      const wave = inputBuffer.getChannelData(0);
      const clock = audio.getOutputTimestamp();
      for (let i = 0; i < wave.length; i++) {
        if (Math.abs(wave[i]) > 0.1) {
          if (quiet > 0.3 * audio.sampleRate) {
            const at = playbackTime - node.bufferSize / audio.sampleRate + i / audio.sampleRate;
            live.loud.push(clock.performanceTime + 1e3 * (at - clock.contextTime));
          }
          quiet = 0;
        } else quiet++;
      }
    };
    source.connect(node).connect(audio.destination);
  };

  live.stats = async () => {
    const out = {};
    for (const row of (await peers.at(-1).getStats()).values()) {
      if (row.type === "inbound-rtp") out[row.kind] = row;
    }
    return out;
  };
})();
