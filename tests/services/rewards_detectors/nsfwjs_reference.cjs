// What nsfwjs itself says of pictures: `node nsfwjs_reference.cjs < pictures.json`, with nsfwjs and @tensorflow/tfjs installed
// in the folder that it runs in. In: [{"shape": [H, W, 3], "data": base64}]. Out: [{"Drawing": p, ...}].
const { createRequire } = require("module");
const need = createRequire(process.cwd() + "/");
const tf = need("@tensorflow/tfjs");
const nsfw = need("nsfwjs");
console.info = () => {};
(async () => {
  await tf.setBackend("cpu");
  const pictures = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const model = await nsfw.load("MobileNetV2");
  const out = [];
  for (const { shape, data } of pictures) {
    const pixels = tf.tensor3d(new Int32Array(Buffer.from(data, "base64")), shape, "int32");
    const found = await model.classify(pixels, 5);
    out.push(Object.fromEntries(found.map((f) => [f.className, f.probability])));
  }
  process.stdout.write(JSON.stringify(out));
})();
