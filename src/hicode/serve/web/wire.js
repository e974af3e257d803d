// The call over a WebSocket, where WebRTC does not connect: H.264 by WebCodecs, sound by an audio worklet.
// The sound's clock leads: a picture is drawn when the sound of its tick is heard.

const WAITING = 15; // decoded pictures that wait for their sound

export class Wire {
  constructor(canvas, onMessage, onPicture, onEnd) {
    Object.assign(this, { canvas, onMessage, onPicture, onEnd });
    this.pictures = [];
    this.speaking = false;
    this.keyed = false;
  }

  /** Resolves when the server has answered. */
  async open(query) {
    if (!window.VideoDecoder) throw new Error("This browser has neither a WebRTC connection nor WebCodecs. Use a current one.");
    this.audio = new AudioContext({ sampleRate: 48000, latencyHint: "interactive" });
    await this.audio.audioWorklet.addModule("/web/sound.js");
    this.player = new AudioWorkletNode(this.audio, "player", { numberOfInputs: 0, outputChannelCount: [1] });
    this.player.connect(this.audio.destination);
    this.player.port.onmessage = ({ data }) => setTimeout(() => this.draw(data), 1e3 * (this.audio.outputLatency || 0));
    this.decoder = this.makeDecoder();
    this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/api/live?${query}`);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.receive(JSON.parse(data)) : this.take(data));
    await new Promise((done, failed) => {
      this.socket.onopen = done;
      this.socket.onclose = () => failed(new Error("The server refused the connection. Reload the page."));
    });
    this.socket.onclose = () => this.onEnd("The connection was lost. Choose the avatar again.");
  }

  makeDecoder() {
    const decoder = new VideoDecoder({
      output: (frame) => {
        this.pictures.push(frame);
        while (this.pictures.length > WAITING) this.pictures.shift().close();
      },
      error: () => { this.keyed = false; }, // begins again with the next key frame
    });
    decoder.configure({ codec: "avc1.42E01F", optimizeForLatency: true });
    return decoder;
  }

  receive(message) {
    if (message.type === "state") this.speaking = message.state === "speaking";
    this.onMessage(message);
  }

  /** One tick: see hicode/serve/socket.py. */
  take(data) {
    const view = new DataView(data), number = view.getUint32(0, true), flags = view.getUint8(4), length = view.getUint32(5, true);
    const samples = flags & 2 ? new Int16Array(data.slice(9 + length)) : null;
    this.player.port.postMessage({ number, samples }, samples ? [samples.buffer] : []);
    if (!length) return;
    const key = (flags & 1) === 1;
    if (this.decoder.state === "closed") this.decoder = this.makeDecoder();
    if (!key && !this.keyed) return;
    this.keyed = true;
    this.decoder.decode(new EncodedVideoChunk({
      type: key ? "key" : "delta", timestamp: number * 40000, data: new Uint8Array(data, 9, length),
    }));
  }

  /** The picture of a tick that is heard now. */
  draw(number) {
    let frame = null;
    while (this.pictures.length && this.pictures[0].timestamp <= number * 40000) {
      frame?.close();
      frame = this.pictures.shift();
    }
    if (!frame) return;
    if (this.canvas.width !== frame.displayWidth) [this.canvas.width, this.canvas.height] = [frame.displayWidth, frame.displayHeight];
    this.canvas.getContext("2d").drawImage(frame, 0, 0);
    frame.close();
    this.onPicture();
  }

  send(message) {
    if (this.socket?.readyState !== WebSocket.OPEN) throw new Error("The conversation is not ready yet. Wait a moment.");
    this.socket.send(JSON.stringify(message));
  }

  /** Half-duplex: while the avatar speaks, nothing is sent, for the browser does not take out what a worklet plays. */
  listen(stream) {
    const microphone = new AudioWorkletNode(this.audio, "microphone", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
    microphone.port.onmessage = ({ data }) => this.speaking || this.socket.readyState !== WebSocket.OPEN || this.socket.send(data);
    this.audio.createMediaStreamSource(stream).connect(microphone);
  }

  mute() {
    this.player.port.postMessage("mute");
  }

  close() {
    if (this.socket) this.socket.onclose = null;
    this.socket?.close();
    if (this.decoder?.state !== "closed") this.decoder?.close();
    this.pictures.splice(0).forEach((frame) => frame.close());
    this.audio?.close();
  }
}
