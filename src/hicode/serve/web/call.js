// One conversation: picture, sound, microphone and messages, over WebRTC or, where that does not connect, a WebSocket.

import { post } from "./page.js";
import { Wire } from "./wire.js";

const CONNECT_MS = 3000;

export class Call {
  /** `onMessage` gets what the server says; `onPicture` is called with the first picture; `onEnd` once, with a sentence. */
  constructor(video, canvas, { onMessage, onPicture, onEnd }) {
    Object.assign(this, { video, canvas, onMessage, onPicture, onEnd });
    this.over = this.connected = false;
    this.session = "";
  }

  async begin(avatar) {
    const connected = window.RTCPeerConnection && (await this.connect(avatar));
    if (connected || this.over) return;
    this.peer?.close();
    this.peer = null;
    this.video.hidden = true;
    this.canvas.hidden = false;
    const wire = new Wire(this.canvas, (message) => this.receive(message), () => this.pictured(), (message) => this.end(message));
    this.wire = wire;
    await wire.open(this.session ? `session=${this.session}` : `avatar=${encodeURIComponent(avatar)}`);
  }

  /** By WebRTC; false where it does not connect in time. */
  async connect(avatar) {
    const peer = (this.peer = new RTCPeerConnection());
    this.microphone = peer.addTransceiver("audio", { direction: "sendrecv" });
    const picture = peer.addTransceiver("video", { direction: "recvonly" });
    const codecs = RTCRtpReceiver.getCapabilities("video")?.codecs ?? [];
    const vp8 = codecs.filter((codec) => ["video/VP8", "video/rtx"].includes(codec.mimeType));
    if (vp8.length) picture.setCodecPreferences?.(vp8);
    const stream = new MediaStream();
    peer.addEventListener("track", (event) => {
      stream.addTrack(event.track);
      this.video.srcObject = stream;
      this.video.play().catch(() => {});
    });
    this.video.requestVideoFrameCallback?.(() => this.pictured());
    this.channel = peer.createDataChannel("messages");
    this.channel.addEventListener("message", (event) => this.receive(JSON.parse(event.data)));
    await peer.setLocalDescription(await peer.createOffer());
    await gathered(peer);
    const answer = await post("/api/offer", { avatar, sdp: peer.localDescription.sdp });
    if (this.over) return false;
    this.session = answer.session;
    await peer.setRemoteDescription({ type: "answer", sdp: answer.sdp });
    this.connected = await settled(peer);
    peer.addEventListener("connectionstatechange", () => {
      if (this.connected && ["failed", "closed"].includes(peer.connectionState)) this.end("The connection was lost. Choose the avatar again.");
    });
    return this.connected;
  }

  pictured() {
    if (this.over) return;
    this.onPicture?.();
    this.onPicture = null;
  }

  receive(message) {
    if (message.type === "session") this.session = message.session;
    if (message.ended) this.end(message.message);
    else if (!this.over) this.onMessage(message);
  }

  get ready() {
    return this.wire ? this.wire.socket?.readyState === WebSocket.OPEN : this.channel?.readyState === "open";
  }

  send(message) {
    if (!this.ready) throw new Error("The conversation is not ready yet. Wait a moment.");
    if (this.wire) this.wire.send(message);
    else this.channel.send(JSON.stringify(message));
  }

  /** Sound that has arrived and was not played yet is not to be heard; what follows is, once it is unmuted. */
  mute(on) {
    if (!this.wire) this.video.muted = on;
    else if (on) this.wire.mute();
  }

  /** Open the microphone once; Chrome takes out of it what a WebRTC call plays. */
  async listen() {
    if (this.tracks) return;
    if (!navigator.mediaDevices) throw new Error("This page may not use the microphone. Open it as localhost or by https.");
    let stream;
    try {
      const audio = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      stream = await navigator.mediaDevices.getUserMedia({ audio });
    } catch (error) {
      const none = error.name === "NotFoundError";
      throw new Error(none ? "No microphone was found. Connect one." : "The microphone may not be used. Allow it in the browser.");
    }
    this.tracks = stream.getTracks();
    if (this.wire) this.wire.listen(stream);
    else await this.microphone.sender.replaceTrack(this.tracks[0]);
  }

  end(message = "") {
    if (this.over) return;
    this.over = true;
    this.tracks?.forEach((track) => track.stop());
    this.peer?.close();
    this.wire?.close();
    this.video.srcObject = null;
    this.video.hidden = false;
    this.canvas.hidden = true;
    this.onEnd(message);
  }
}

/** Candidates are sent with the offer: on this machine they are there at once. */
function gathered(peer) {
  if (peer.iceGatheringState === "complete") return Promise.resolve();
  return new Promise((done) => {
    setTimeout(done, 1000);
    peer.addEventListener("icegatheringstatechange", () => peer.iceGatheringState === "complete" && done());
  });
}

function settled(peer) {
  return new Promise((done) => {
    const look = () => {
      if (peer.connectionState === "connected") done(true);
      if (["failed", "closed"].includes(peer.connectionState)) done(false);
    };
    setTimeout(() => done(peer.connectionState === "connected"), CONNECT_MS);
    peer.addEventListener("connectionstatechange", look);
    look();
  });
}
