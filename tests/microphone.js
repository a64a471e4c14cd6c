// In the place of a microphone: `say` plays a recording into it, and all else is silence.
(() => {
  if (!navigator.mediaDevices) return; // an empty page before the one that is tested
  let context = null;
  let out = null;
  window.opened = []; // what each opening asked for
  navigator.mediaDevices.getUserMedia = async (wanted) => {
    window.opened.push(wanted);
    context ??= new AudioContext();
    await context.resume();
    out = context.createMediaStreamDestination();
    window.microphone = out.stream;
    return out.stream;
  };
  /** Say a WAV, given in base64, and return when it is said. */
  window.say = async (recording) => {
    const bytes = Uint8Array.from(atob(recording), (letter) => letter.charCodeAt(0));
    const buffer = await context.decodeAudioData(bytes.buffer);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(out);
    const said = new Promise((resolve) => (source.onended = resolve));
    source.start();
    await said;
  };
})();
