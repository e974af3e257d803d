"""A LiveKit voice agent with an avatar's face; `pip install 'hicode[livekit]'`.

The avatar in the agent's own process:

    HICODE_AVATAR=me.hicode python examples/04_livekit.py dev

Or a worker of its own, so that many machines share the work: run `worker` there with a token whose attribute
`lk.publish_on_behalf` names the agent, and give the agent
`DataStreamAudioOutput(room, destination_identity=AVATAR, sample_rate=24_000, wait_playback_start=True)`.
LIVEKIT_URL and the keys of your speech and language services come from the environment.
"""

import os

from livekit import agents, rtc
from livekit.agents.voice.avatar import DataStreamAudioReceiver, QueueAudioOutput

from hicode.integrations.live_avatar import OUTPUT_RATE_HZ
from hicode.integrations.livekit import LiveKitAvatar

AVATAR = "hicode-avatar"


def new_session() -> agents.AgentSession:
    """Your speech recognition, language model and voice; these names go through LiveKit's own inference."""
    return agents.AgentSession(stt="deepgram/nova-3", llm="openai/gpt-4.1-mini", tts="cartesia/sonic-3")


async def attach(session: agents.AgentSession, room: rtc.Room, avatar) -> LiveKitAvatar:
    """The avatar speaks what the session says."""
    audio = QueueAudioOutput(sample_rate=OUTPUT_RATE_HZ, wait_playback_start=True)
    face = LiveKitAvatar(room, audio, avatar)
    await face.start()
    session.output.replace_audio_tail(audio)
    return face


async def entrypoint(context: agents.JobContext) -> None:
    """One conversation."""
    await context.connect()
    session = new_session()
    face = await attach(session, context.room, os.environ["HICODE_AVATAR"])
    context.add_shutdown_callback(face.aclose)
    await session.start(agents.Agent(instructions="You are friendly and brief."), room=context.room)
    await session.generate_reply(instructions="Greet the user.")


async def worker(room: rtc.Room, agent_identity: str, avatar) -> None:
    """The avatar as a participant of its own, in a room that is connected."""
    audio = DataStreamAudioReceiver(room, sender_identity=agent_identity)
    async with LiveKitAvatar(room, audio, avatar) as face:
        assert face.runner is not None
        await face.runner.wait_for_complete()


if __name__ == "__main__":
    agents.cli.run_app(agents.WorkerOptions(entrypoint_fnc=entrypoint))
