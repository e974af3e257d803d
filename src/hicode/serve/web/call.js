// One conversation: picture, sound, microphone and messages over WebRTC.

import { post } from "./page.js";

export class Call {
  /** `onMessage` gets what the server says; `onEnd` is called once, with a sentence, when the call is over. */
  constructor(video, onMessage, onEnd) {
    this.video = video;
    this.onMessage = onMessage;
    this.onEnd = onEnd;
    this.over = false;
    this.session = "";
  }

  async begin(avatar) {
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
    peer.addEventListener("connectionstatechange", () => {
      if (["failed", "closed"].includes(peer.connectionState)) this.end("The connection was lost. Choose the avatar again.");
    });
    this.channel = peer.createDataChannel("messages");
    this.channel.addEventListener("message", (event) => this.receive(JSON.parse(event.data)));
    await peer.setLocalDescription(await peer.createOffer());
    await gathered(peer);
    const answer = await post("/api/offer", { avatar, sdp: peer.localDescription.sdp });
    if (this.over) return;
    this.session = answer.session;
    await peer.setRemoteDescription({ type: "answer", sdp: answer.sdp });
  }

  receive(message) {
    if (message.ended) this.end(message.message);
    else this.onMessage(message);
  }

  send(message) {
    if (this.channel?.readyState !== "open") throw new Error("The conversation is not ready yet. Wait a moment.");
    this.channel.send(JSON.stringify(message));
  }

  /** Open the microphone once; Chrome takes out of it what the call plays. */
  async listen() {
    if (this.tracks) return;
    if (!navigator.mediaDevices) throw new Error("This page may not use the microphone. Open it as localhost or by https.");
    try {
      const audio = { echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      const stream = await navigator.mediaDevices.getUserMedia({ audio });
      this.tracks = stream.getTracks();
    } catch (error) {
      const none = error.name === "NotFoundError";
      throw new Error(none ? "No microphone was found. Connect one." : "The microphone may not be used. Allow it in the browser.");
    }
    await this.microphone.sender.replaceTrack(this.tracks[0]);
  }

  end(message = "") {
    if (this.over) return;
    this.over = true;
    this.tracks?.forEach((track) => track.stop());
    this.peer?.close();
    this.video.srcObject = null;
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
