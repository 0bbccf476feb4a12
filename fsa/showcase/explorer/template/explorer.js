"use strict";

// ---- What the page was given --------------------------------------------------------------------

const data = JSON.parse(document.getElementById("data").textContent);
const [ROWS, COLUMNS] = data.grid;
const N = ROWS * COLUMNS;
const C = data.queries.length;

function bytes(text) {
  const raw = atob(text);
  const out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

const TYPES = { float32: Float32Array, uint16: Uint16Array, int16: Int16Array, int8: Int8Array };

function typed(type, text) {
  return new TYPES[type](bytes(text).buffer);
}

/** Cosines of patches with texts, row by row. */
function unpackCosines(packed) {
  const values = typed(packed.type, packed.values);
  if (packed.type === "float32") return values;
  return Float64Array.from(values, (level) => packed.low + packed.step * level);
}

/** A matrix whose entries are the row's largest times the square of their level, with its sign. */
function unpackRows(packed) {
  const levels = typed(packed.type, packed.levels);
  const largest = typed("float32", packed.largest);
  const highest = packed.type === "int16" ? 32767 : 127;
  const width = levels.length / largest.length;
  const out = new Float32Array(levels.length);
  for (let i = 0; i < levels.length; i++) {
    const share = levels[i] / highest;
    out[i] = largest[Math.floor(i / width)] * share * Math.abs(share);
  }
  return out;
}

/** A label map from pairs of a label and the length of its run, each number 7 bits a byte. */
function unpackLabels(text, size) {
  const packed = bytes(text);
  const labels = new Int32Array(size);
  let at = 0;
  const number = () => {
    let value = 0;
    for (let shift = 0; ; shift += 7) {
      const byte = packed[at++];
      value += (byte & 127) * 2 ** shift;
      if (byte < 128) return value;
    }
  };
  for (let i = 0; i < size; ) {
    const label = number();
    const end = i + number();
    labels.fill(label, i, end);
    i = end;
  }
  return labels;
}

const cosines = unpackCosines(data.cosines);
const uniformCosines = unpackCosines(data.uniformCosines);
const attention = unpackRows(data.attention);
const adaptedPredictions = unpackRows(data.adaptedPredictions);

// ---- Feedback by its definition (Eqs. 6 to 14), in double precision -----------------------------

function softmaxInto(out, start, logits) {
  let largest = -Infinity;
  for (let c = 0; c < logits.length; c++) largest = Math.max(largest, logits[c]);
  let sum = 0;
  for (let c = 0; c < logits.length; c++) sum += out[start + c] = Math.exp(logits[c] - largest);
  for (let c = 0; c < logits.length; c++) out[start + c] /= sum;
}

/** P (N,C), the predictions that feedback compares, and what the two similarities need of it. */
const predictionsOf = (() => {
  const made = new Map();
  return (isolation) => {
    if (made.has(isolation)) return made.get(isolation);
    const scale = data.config.logit_scale;
    const uniformScale = isolation ? data.config.uniform_logit_scale : 0;
    const uniformStep = data.uniformCosines.rows === 1 ? 0 : C;
    const P = new Float64Array(N * C);
    const log = new Float64Array(N * C);
    const unit = new Float64Array(N * C);
    const logits = new Float64Array(C);
    for (let i = 0; i < N; i++) {
      const start = i * C;
      for (let c = 0; c < C; c++) {
        logits[c] = scale * cosines[start + c] - uniformScale * uniformCosines[i * uniformStep + c];
      }
      softmaxInto(P, start, logits);
      let squares = 0;
      for (let c = start; c < start + C; c++) squares += P[c] * P[c];
      for (let c = start; c < start + C; c++) {
        log[c] = Math.log(P[c] + data.probabilityFloor);
        unit[c] = P[c] / Math.sqrt(squares);
      }
    }
    made.set(isolation, { P, log, unit });
    return made.get(isolation);
  };
})();

/** S of patch i with all patches: 1 / (1 + KL), or the cosine. */
function similarityRow(i, { similarity, isolation }) {
  const { P, log, unit } = predictionsOf(isolation);
  const S = new Float64Array(N);
  const own = i * C;
  for (let j = 0; j < N; j++) {
    const other = j * C;
    let sum = 0;
    if (similarity === "cosine") {
      for (let c = 0; c < C; c++) sum += unit[own + c] * unit[other + c];
      S[j] = Math.min(Math.max(sum, 0), 1);
    } else {
      for (let c = 0; c < C; c++) sum += P[own + c] * (log[own + c] - log[other + c]);
      S[j] = 1 / (1 + Math.max(sum, 0));
    }
  }
  return S;
}

/** How many patches are kept, of similarities in descending order; the first always is. */
function keptCount(ordered, cumulative, { pruning, confidence, ratio, threshold }) {
  let count = N;
  if (pruning === "confidence" && confidence < 1) {
    count = cumulative.findIndex((sum) => sum > confidence);
  } else if (pruning === "ratio") {
    count = Math.floor(ratio * N);
  } else if (pruning === "threshold") {
    count = ordered.findIndex((S) => S < threshold);
  }
  return Math.max(count < 0 ? N : count, 1);
}

/** A_f of a patch, which patches it keeps, and the order that decided it. */
function feedbackRow(S, settings) {
  const ordered = Float64Array.from(S).sort().reverse();
  const cumulative = new Float64Array(N);
  softmaxInto(cumulative, 0, ordered);
  for (let j = 1; j < N; j++) cumulative[j] += cumulative[j - 1];
  const count = keptCount(ordered, cumulative, settings);

  // Of equal similarities at the cut, those of the lowest patch index are kept.
  const last = ordered[count - 1];
  let equal = count - ordered.indexOf(last);
  const kept = new Uint8Array(N);
  for (let j = 0; j < N; j++) kept[j] = S[j] > last || (S[j] === last && equal-- > 0) ? 1 : 0;

  const F = S.map((s, j) => {
    if (!kept[j]) return -Infinity;
    return settings.scaling ? s * Math.exp(settings.beta * s) : s;
  });
  const row = new Float64Array(N);
  softmaxInto(row, 0, F);
  return { row, kept, count, ordered, cumulative };
}

/** A_f of all patches, made as far as they are asked for and kept until the settings change. */
const feedbackRows = {
  similarityKey: "",
  key: "",
  similarities: [],
  rows: [],
  next: 0,

  use(settings) {
    const similarityKey = `${settings.similarity} ${settings.isolation}`;
    if (similarityKey !== this.similarityKey) this.similarities = [];
    this.similarityKey = similarityKey;
    const { pruning, scaling } = settings;
    const key = JSON.stringify([
      similarityKey, pruning, pruning && settings[pruning], scaling, scaling && settings.beta,
    ]);
    if (key !== this.key) [this.rows, this.next] = [[], 0];
    this.key = key;
  },

  at(i, settings) {
    this.use(settings);
    this.similarities[i] ??= similarityRow(i, settings);
    return feedbackRow(this.similarities[i], settings);
  },

  /** Makes rows until they are all there or the time is up; says whether they are. */
  fill(settings, deadline) {
    this.use(settings);
    while (this.next < N) {
      this.rows[this.next] = Float32Array.from(this.at(this.next, settings).row);
      this.next++;
      if (performance.now() > deadline) break;
    }
    return this.next === N;
  },
};

/** What takes the place of A for patch i: the mean of A_f A, A A_f and A_f. */
function adaptedRow(i, feedback, { adaptations }) {
  const out = new Float64Array(N);
  const add = (weight, row, start) => {
    if (weight === 0) return;
    for (let k = 0; k < N; k++) out[k] += weight * row[start + k];
  };
  if (adaptations.includes("after")) {
    for (let j = 0; j < N; j++) add(feedback[j], attention, j * N);
  }
  if (adaptations.includes("before")) {
    for (let j = 0; j < N; j++) add(attention[i * N + j], feedbackRows.rows[j], 0);
  }
  if (adaptations.includes("only")) add(1, feedback, 0);
  return out.map((value) => value / adaptations.length);
}

// ---- State: the settings and the patch, kept in the address so that a view can be shared --------

const NUMBERS = ["confidence", "ratio", "threshold", "beta"];
const SWITCHES = ["isolation", "scaling"];
const ADAPTATIONS = ["after", "before", "only"];
const CHOICES = {
  similarity: ["kl", "cosine"],
  pruning: ["confidence", "ratio", "threshold", null],
};

function computedSettings() {
  const names = [...NUMBERS, ...SWITCHES, ...Object.keys(CHOICES)];
  const settings = Object.fromEntries(names.map((name) => [name, data.config[name]]));
  const adaptations = ADAPTATIONS.filter((name) => data.config.adaptations.includes(name));
  return { ...settings, adaptations };
}

let settings = computedSettings();
let pinned = data.patch;
let pointed = null;

function address() {
  const parts = [`patch=${Math.floor(pinned / COLUMNS)},${pinned % COLUMNS}`];
  const computed = computedSettings();
  for (const [name, value] of Object.entries(settings)) {
    if (String(value) !== String(computed[name])) parts.push(`${name}=${value}`);
  }
  return `#${parts.join("&")}`;
}

function readAddress() {
  const given = new Map(
    location.hash.slice(1).split("&").map((part) => part.split("=")).filter((p) => p.length === 2),
  );
  const [row, column] = (given.get("patch") ?? "").split(",").map((n) => parseInt(n, 10));
  if (row >= 0 && row < ROWS && column >= 0 && column < COLUMNS) pinned = row * COLUMNS + column;
  for (const name of NUMBERS) {
    const value = Number(given.get(name) ?? NaN);
    const low = name === "confidence" || name === "ratio" ? 1e-6 : 0;
    if (value >= low && value <= (name === "beta" ? 80 : 1)) settings[name] = value;
  }
  for (const name of SWITCHES) {
    if (["true", "false"].includes(given.get(name))) settings[name] = given.get(name) === "true";
  }
  for (const [name, accepted] of Object.entries(CHOICES)) {
    const found = accepted.find((value) => String(value) === given.get(name));
    if (found !== undefined) settings[name] = found;
  }
  const chosen = ADAPTATIONS.filter((a) => (given.get("adaptations") ?? "").split(",").includes(a));
  if (chosen.length) settings.adaptations = chosen;
}

// ---- Words --------------------------------------------------------------------------------------

const $ = (id) => document.getElementById(id);

function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  return `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;
}

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

/** A list item whose "A_f" are written with a subscript. */
function withSubscripts(text) {
  const item = element("li");
  text.split("A_f").forEach((part, number) => {
    if (number > 0) item.append("A", element("sub", "f"));
    item.append(part);
  });
  return item;
}

const rgb = (colour) => `rgb(${colour.join(" ")})`;

function writeFacts() {
  const { picture, host, model, pretrained, vfm } = data.about;
  const named = pretrained && pretrained !== model ? `${model} (${pretrained})` : model;
  const guide = vfm ? ` guided by ${vfm}` : "";
  const changed = `feedback changes ${percent(data.changed)} of the pixels`;
  $("facts").textContent = `${picture} · ${host}${guide}, model ${named} · ${changed}`;
}

function writeNotes() {
  const { config, about, size } = data;
  const notes = [
    "Attention never leaves a window. This page shows one window of the picture, the white frame, " +
      `of ${ROWS} × ${COLUMNS} = ${N} patches; the picture was resized to ${size[1]} × ${size[0]} ` +
      `pixels and cut into windows of at most ${about.windows} pixels. The labels are the average ` +
      "of all windows, so at a patch they may differ from its predictions in this window.",
    "A is the attention of the segmentor’s last block before feedback, the mean over its heads. " +
      "A colour is the share of the most that a patch other than the chosen one gets.",
    "Feedback compares what two patches predict: the more alike, the more the one attends to the " +
      "other. Pruning keeps the patches that are most alike; kept patches are shown in colour, " +
      "the others are hatched. The result is A_f.",
    "The adapted attention is the mean of A_f A, A A_f and A_f, or of those that are chosen. It " +
      "takes the place of A.",
    "A_f and the adapted attention are computed in this page, in double precision, whenever a " +
      "control moves. The labels and the predictions with feedback stay as they were computed.",
    `The predictions are probabilities: without and with feedback those that decide the labels, ` +
      `at ${data.segmentationScale} times the cosine of patch and text; those that feedback ` +
      `compares are taken at ${config.logit_scale} times the cosine, and attention isolation ` +
      `subtracts ${config.uniform_logit_scale} times the cosine that uniform attention gives.`,
    "The file holds A to within " +
      (data.exactAttention ? "0.01%" : "1%") +
      " of the largest entry of a row, and the cosines of patches and texts " +
      (data.exact ? "as they were computed" : "in 65,536 steps, so a patch at the cut may differ") +
      ".",
  ];
  if (config.iterations > 1) {
    notes.push(
      `Feedback ran ${config.iterations} times for the labels; the patches that this page shows ` +
        "are those of the first time.",
    );
  }
  $("notes").replaceChildren(...notes.map(withSubscripts));
}

function writeLegend() {
  const present = data.classes.filter((c) => c.without > 0 || c.with > 0);
  present.sort((a, b) => b.without + b.with - (a.without + a.with));
  $("legend").replaceChildren(
    ...present.map((c) => {
      const swatch = element("i");
      swatch.style.background = rgb(c.colour);
      const item = element("li");
      const shares = element("small", `${percent(c.without)} → ${percent(c.with)}`);
      item.append(swatch, element("span", c.name), shares);
      return item;
    }),
  );
}

// ---- The picture and its labels -----------------------------------------------------------------

const photo = new Image();
const stage = $("picture");
const labels = {};
const layers = {};
let grey;
let pointedPixel = null;

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

/** A picture's light without its colours. */
function greyed(image, width, height) {
  const canvas = canvasOf(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, width, height);
  const pixels = context.getImageData(0, 0, width, height);
  for (let i = 0; i < pixels.data.length; i += 4) {
    pixels.data.fill((pixels.data[i] + pixels.data[i + 1] + pixels.data[i + 2]) / 3, i, i + 3);
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** A label map in the colours of its classes, with dark lines between them. */
function painted(map, width, height) {
  const canvas = canvasOf(width, height);
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  for (let i = 0; i < map.length; i++) {
    const [left, above] = [i % width ? i - 1 : i, i >= width ? i - width : i];
    const border = map[i] !== map[left] || map[i] !== map[above];
    const colour = data.classes[map[i]].colour;
    for (let k = 0; k < 3; k++) pixels.data[4 * i + k] = colour[k] * (border ? 0.35 : 1);
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
  return canvas;
}

/** A white box between black lines around a place, moved inwards where the canvas ends. */
function box(context, left, top, width, height) {
  const { canvas } = context;
  const room = 2 * devicePixelRatio;
  const within = (value, size) => Math.min(Math.max(value, room), size - room);
  const [x, right] = [left - room / 2, left + width + room / 2].map((v) => within(v, canvas.width));
  const [y, low] = [top - room / 2, top + height + room / 2].map((v) => within(v, canvas.height));
  for (const [line, colour] of [[4, "#000"], [2, "#fff"]]) {
    context.lineWidth = line * devicePixelRatio;
    context.strokeStyle = colour;
    context.strokeRect(x, y, right - x, low - y);
  }
}

/** Where the window lies in the picture, in shares of its sides. */
const area = {
  left: data.window.left / data.size[1],
  top: data.window.top / data.size[0],
  width: data.window.width / data.size[1],
  height: data.window.height / data.size[0],
};

function drawPicture() {
  const { width, height } = stage;
  const context = stage.getContext("2d");
  context.globalAlpha = 1;
  context.drawImage(grey, 0, 0, width, height);
  const middle = (width * $("divider").value) / 100;
  context.globalAlpha = $("tint").value / 100;
  for (const [name, left, right] of [["without", 0, middle], ["with", middle, width]]) {
    context.save();
    context.beginPath();
    context.rect(left, 0, right - left, height);
    context.clip();
    context.drawImage(layers[name], 0, 0, width, height);
    context.restore();
  }
  context.globalAlpha = 1;
  const patch = current();
  const cell = [(area.width * width) / COLUMNS, (area.height * height) / ROWS];
  const [left, top] = [area.left * width, area.top * height];
  box(context, left, top, area.width * width, area.height * height);
  const [row, column] = [Math.floor(patch / COLUMNS), patch % COLUMNS];
  box(context, left + column * cell[0], top + row * cell[1], ...cell);
  context.fillStyle = "#000";
  context.fillRect(middle - 2.5 * devicePixelRatio, 0, 5 * devicePixelRatio, height);
  context.fillStyle = "#fff";
  context.fillRect(middle - 1.5 * devicePixelRatio, 0, 3 * devicePixelRatio, height);
}

function writePixel() {
  if (!pointedPixel) return;
  const { width, height } = data.picture;
  const at = (share, size) => Math.min(Math.max(Math.floor(share * size), 0), size - 1);
  const index = at(pointedPixel.y, height) * width + at(pointedPixel.x, width);
  const [before, after] = ["without", "with"].map((name) => data.classes[labels[name][index]].name);
  $("pixel").textContent =
    before === after
      ? `Here: ${before}, without and with feedback.`
      : `Here: ${before} without, ${after} with feedback.`;
}

function place(event, canvas) {
  const frame = canvas.getBoundingClientRect();
  return {
    x: (event.clientX - frame.left) / frame.width,
    y: (event.clientY - frame.top) / frame.height,
    width: frame.width,
  };
}

function listenToPicture() {
  let dragging = false;
  const near = (at) => Math.abs(at.x - $("divider").value / 100) * at.width < 14;
  stage.addEventListener("pointerdown", (event) => {
    const at = place(event, stage);
    pointedPixel = at;
    writePixel();
    dragging = near(at);
    if (dragging) {
      stage.setPointerCapture(event.pointerId);
      return;
    }
    const column = Math.floor(((at.x - area.left) / area.width) * COLUMNS);
    const row = Math.floor(((at.y - area.top) / area.height) * ROWS);
    if (row >= 0 && row < ROWS && column >= 0 && column < COLUMNS) pin(row * COLUMNS + column);
  });
  stage.addEventListener("pointermove", (event) => {
    const at = place(event, stage);
    if (dragging) {
      $("divider").value = 100 * at.x;
      schedule();
    }
    stage.style.cursor = dragging || near(at) ? "ew-resize" : "crosshair";
    pointedPixel = at;
    writePixel();
  });
  for (const end of ["pointerup", "pointercancel"]) {
    stage.addEventListener(end, () => (dragging = false));
  }
  for (const id of ["divider", "tint"]) $(id).addEventListener("input", schedule);
}

// ---- The maps of one patch ----------------------------------------------------------------------

const MAPS = ["before", "kept", "feedback", "adapted"];
let crops;

/** The window's part of the picture, on grey where the window reaches beyond it. */
function cropOf(image) {
  const scale = data.picture.width / data.size[1];
  const canvas = canvasOf(
    Math.max(1, Math.round(data.window.width * scale)),
    Math.max(1, Math.round(data.window.height * scale)),
  );
  const context = canvas.getContext("2d");
  context.fillStyle = "#808080";
  context.fillRect(0, 0, canvas.width, canvas.height);
  const [left, top] = [-data.window.left * scale, -data.window.top * scale];
  context.drawImage(image, left, top, data.picture.width, data.picture.height);
  return canvas;
}

/** A colour of the scale from dark blue to yellow for a value in [0, 1]. */
function heat(value) {
  const at = Math.min(Math.max(value, 0), 1) * (data.heat.length - 1);
  const low = Math.min(Math.floor(at), data.heat.length - 2);
  return data.heat[low].map((c, k) => c + (at - low) * (data.heat[low + 1][k] - c));
}

/** The most that a patch other than i gets of a row. */
function mostOfOthers(row, i) {
  let most = 0;
  for (let j = 0; j < N; j++) if (j !== i) most = Math.max(most, row[j]);
  return most;
}

function drawMap(name, cells, crop, patch) {
  const canvas = $(`map-${name}`);
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.imageSmoothingEnabled = true;
  context.drawImage(crop, 0, 0, width, height);
  context.imageSmoothingEnabled = false;
  context.drawImage(cells, 0, 0, width, height);
  const cell = [width / COLUMNS, height / ROWS];
  const [row, column] = [Math.floor(patch / COLUMNS), patch % COLUMNS];
  box(context, column * cell[0], row * cell[1], ...cell);
}

function drawHeat(name, row, patch) {
  const cells = canvasOf(COLUMNS, ROWS);
  const context = cells.getContext("2d");
  const pixels = context.createImageData(COLUMNS, ROWS);
  const most = mostOfOthers(row, patch) || 1;
  for (let j = 0; j < N; j++) pixels.data.set([...heat(row[j] / most), 195], 4 * j);
  context.putImageData(pixels, 0, 0);
  drawMap(name, cells, crops.grey, patch);
}

function drawKept(kept, patch) {
  const { width, height } = $("map-kept");
  const cells = canvasOf(width, height);
  const context = cells.getContext("2d");
  const edge = (k, count, size) => Math.round((k * size) / count);
  context.beginPath();
  for (let j = 0; j < N; j++) {
    if (kept[j]) continue;
    const [row, column] = [Math.floor(j / COLUMNS), j % COLUMNS];
    const [left, top] = [edge(column, COLUMNS, width), edge(row, ROWS, height)];
    const right = edge(column + 1, COLUMNS, width);
    context.rect(left, top, right - left, edge(row + 1, ROWS, height) - top);
  }
  context.clip();
  context.fillStyle = "#ffffffb8";
  context.fillRect(0, 0, width, height);
  context.strokeStyle = "#5a626e";
  context.lineWidth = devicePixelRatio;
  context.beginPath();
  for (let x = -height; x < width; x += 7 * devicePixelRatio) {
    context.moveTo(x, height);
    context.lineTo(x + height, 0);
  }
  context.stroke();
  drawMap("kept", cells, crops.colour, patch);
}

function describe(name, text, spoken) {
  $(`text-${name}`).textContent = text;
  $(`map-${name}`).setAttribute("aria-label", spoken);
}

/** How much of a row goes to the patch itself, in words. */
function summary(row, patch) {
  let sum = 0;
  for (let j = 0; j < N; j++) sum += row[j];
  return sum > 0 ? `${percent(row[patch] / sum)} to itself` : "nothing";
}

function drawMaps(patch, found) {
  const before = attention.subarray(patch * N, (patch + 1) * N);
  drawHeat("before", before, patch);
  const ownBefore = summary(before, patch);
  describe("before", ownBefore, `Attention before feedback: ${ownBefore}`);
  drawKept(found.kept, patch);
  describe("kept", `${found.count} of ${N}`, `${found.count} of ${N} patches are kept`);
  drawHeat("feedback", found.row, patch);
  const own = summary(found.row, patch);
  describe("feedback", own, `Feedback attention: ${own}`);
  drawAdapted();
}

let adaptedTimer = 0;

/** The adapted attention needs A_f of all patches, which are made in short turns. */
function drawAdapted() {
  clearTimeout(adaptedTimer);
  const needsAll = settings.adaptations.includes("before");
  if (needsAll && !feedbackRows.fill(settings, performance.now() + 25)) {
    const done = Math.floor((100 * feedbackRows.next) / N);
    describe("adapted", `computing, ${done}%`, "Adapted attention: being computed");
    adaptedTimer = setTimeout(drawAdapted, 0);
    return;
  }
  const patch = current();
  const row = adaptedRow(patch, feedbackRows.at(patch, settings).row, settings);
  drawHeat("adapted", row, patch);
  describe("adapted", summary(row, patch), `Adapted attention: ${summary(row, patch)}`);
}

function listenToMaps() {
  for (const name of MAPS) {
    const canvas = $(`map-${name}`);
    const patchAt = (event) => {
      const at = place(event, canvas);
      const row = Math.min(Math.max(Math.floor(at.y * ROWS), 0), ROWS - 1);
      return row * COLUMNS + Math.min(Math.max(Math.floor(at.x * COLUMNS), 0), COLUMNS - 1);
    };
    canvas.addEventListener("click", (event) => pin(patchAt(event)));
    canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") point(patchAt(event));
    });
    canvas.addEventListener("pointerleave", () => point(null));
  }
  $("maps").addEventListener("keydown", (event) => {
    const [row, column] = [Math.floor(pinned / COLUMNS), pinned % COLUMNS];
    const to = {
      ArrowUp: [Math.max(row - 1, 0), column],
      ArrowDown: [Math.min(row + 1, ROWS - 1), column],
      ArrowLeft: [row, Math.max(column - 1, 0)],
      ArrowRight: [row, Math.min(column + 1, COLUMNS - 1)],
      Home: [row, 0],
      End: [row, COLUMNS - 1],
      PageUp: [0, column],
      PageDown: [ROWS - 1, column],
    }[event.key];
    if (!to || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    pointed = null;
    pin(to[0] * COLUMNS + to[1]);
  });
}

// ---- The curve and the bars ---------------------------------------------------------------------

function path(values) {
  const x = (j) => (30 + ((j + 1) * 302) / N).toFixed(1);
  const y = (value) => (140 - 130 * Math.min(value, 1)).toFixed(1);
  // More points than the curve is wide would not be seen.
  const step = Math.max(1, Math.floor(N / 600));
  let text = `M${x(0)} ${y(values[0])}`;
  for (let j = step; j < N; j += step) text += `L${x(j)} ${y(values[j])}`;
  return `${text}L${x(N - 1)} ${y(values[N - 1])}`;
}

function drawCurve({ ordered, cumulative, count }) {
  const cut = 30 + (count * 302) / N;
  const level = settings.pruning === "ratio" ? undefined : settings[settings.pruning];
  $("curve-confidence").setAttribute("d", path(cumulative));
  $("curve-similarity").setAttribute("d", path(ordered));
  $("curve-cut").setAttribute("d", `M${cut} 10V140`);
  $("curve-kept").setAttribute("width", cut - 30);
  const y = 140 - 130 * level;
  $("curve-level").setAttribute("d", level === undefined ? "" : `M30 ${y}H332`);
  const words =
    `The first ${count} of ${N} are kept: ${percent(cumulative[count - 1])} of the confidence, ` +
    `similarity of at least ${ordered[count - 1].toFixed(3)}.`;
  $("text-curve").textContent = words;
  $("curve").setAttribute("aria-label", words);
}

const BARS = 5;
const BAR_NAMES = {
  without: "without feedback",
  isolated: "compared by feedback",
  with: "with feedback",
};

function predictionsWithout(patch) {
  const out = new Float64Array(C);
  const logits = Array.from(out, (_, c) => data.segmentationScale * cosines[patch * C + c]);
  softmaxInto(out, 0, logits);
  return out;
}

function drawBars(patch) {
  const { P } = predictionsOf(settings.isolation);
  const rows = {
    without: predictionsWithout(patch),
    isolated: P.subarray(patch * C, (patch + 1) * C),
    with: adaptedPredictions.subarray(patch * C, (patch + 1) * C),
  };
  const most = Array.from({ length: C }, (_, c) =>
    Math.max(...Object.values(rows).map((row) => row[c])),
  );
  const order = most.map((_, c) => c).sort((a, b) => most[b] - most[a]);
  const items = order.slice(0, BARS).map((c) => {
    const { name, class: index } = data.queries[c];
    const swatch = element("i", undefined, "swatch");
    swatch.style.background = rgb(data.classes[index].colour);
    const label = element("span", name, "name");
    label.title = name;
    const track = element("span", undefined, "track");
    const numbers = element("span", undefined, "numbers");
    for (const [kind, row] of Object.entries(rows)) {
      const bar = element("i", undefined, kind);
      bar.style.width = `${100 * row[c]}%`;
      track.append(bar);
      const number = element("span", percent(row[c]));
      number.append(element("span", ` ${BAR_NAMES[kind]}`, "spoken"));
      numbers.append(number);
    }
    const item = element("li");
    item.append(swatch, label, numbers, track);
    return item;
  });
  if (C > BARS) items.push(element("li", `and ${C - BARS} more`, "more"));
  $("bars").replaceChildren(...items);
  return Object.fromEntries(
    Object.entries(rows).map(([kind, row]) => {
      let best = 0;
      for (let c = 1; c < C; c++) if (row[c] > row[best]) best = c;
      return [kind, data.classes[data.queries[best].class].name];
    }),
  );
}

// ---- The controls -------------------------------------------------------------------------------

const form = $("settings");

function showSettings() {
  for (const name of NUMBERS) {
    form.elements[name].value = settings[name];
    form.elements[`${name}-value`].textContent = Number(settings[name].toFixed(3));
  }
  for (const name of SWITCHES) form.elements[name].checked = settings[name];
  form.elements.similarity.value = settings.similarity;
  form.elements.pruning.value = settings.pruning ?? "none";
  for (const name of ADAPTATIONS) {
    const chosen = settings.adaptations.includes(name);
    form.elements[name].checked = chosen;
    form.elements[name].disabled = chosen && settings.adaptations.length === 1;
  }
  for (const field of form.querySelectorAll("[data-for]")) {
    const name = field.dataset.for;
    field.hidden = name === "beta" ? !settings.scaling : name !== settings.pruning;
  }
  const same = JSON.stringify(settings) === JSON.stringify(computedSettings());
  $("reset").disabled = same;
  $("labels-note").classList.toggle("differs", !same);
}

function listenToControls() {
  const beta = form.elements.beta;
  beta.max = Math.max(beta.max, Math.ceil(settings.beta));
  form.addEventListener("input", (event) => {
    const { name, value, checked } = event.target;
    if (NUMBERS.includes(name)) settings[name] = Number(value);
    else if (SWITCHES.includes(name)) settings[name] = checked;
    else if (name === "similarity") settings.similarity = value;
    else if (name === "pruning") settings.pruning = value === "none" ? null : value;
    else settings.adaptations = ADAPTATIONS.filter((a) => form.elements[a].checked);
    changed();
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    settings = computedSettings();
    changed();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
}

// ---- Drawing it all -----------------------------------------------------------------------------

function current() {
  return pointed ?? pinned;
}

function pin(patch) {
  pinned = patch;
  changed();
}

function point(patch) {
  if (pointed === patch) return;
  pointed = patch;
  schedule();
}

function changed() {
  showSettings();
  try {
    history.replaceState(null, "", address());
  } catch {
    // In a sandboxed frame the address stays as it is.
  }
  schedule();
}

let scheduled = 0;

function schedule() {
  scheduled ||= requestAnimationFrame(() => {
    scheduled = 0;
    draw();
  });
}

function draw() {
  const patch = current();
  const found = feedbackRows.at(patch, settings);
  drawPicture();
  drawMaps(patch, found);
  drawCurve(found);
  const best = drawBars(patch);
  const [row, column] = [Math.floor(patch / COLUMNS), patch % COLUMNS];
  const same = best.without === best.with;
  const predicted = same
    ? `Predicted: ${best.with} before and after.`
    : `Predicted: ${best.without} before, ${best.with} after.`;
  $("status").replaceChildren(
    element("span", `Row ${row}, column ${column}: ${found.count} of ${N} patches kept. `),
    element("span", predicted),
  );
}

const TALLEST = 1.6;

/** Canvases as sharp as the screen, narrower where they would be very tall. */
function fit() {
  const sizes = [
    [stage, data.picture.height / data.picture.width],
    ...MAPS.map((name) => [$(`map-${name}`), data.window.height / data.window.width]),
  ];
  for (const [canvas, shape] of sizes) {
    canvas.style.aspectRatio = `1 / ${shape}`;
    canvas.style.width = `${Math.min(1, TALLEST / shape) * 100}%`;
    const width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    const height = Math.max(1, Math.round(width * shape));
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
  }
  draw();
}

async function start() {
  readAddress();
  writeFacts();
  writeNotes();
  writeLegend();
  listenToControls();
  listenToMaps();
  listenToPicture();
  showSettings();
  const stops = data.heat.map(rgb).join(", ");
  $("ramp").style.background = `linear-gradient(to right, ${stops})`;
  stage.setAttribute(
    "aria-label",
    "The picture, tinted by its labels: left of the divider without feedback, right of it with",
  );
  photo.src = data.picture.source;
  await photo.decode();
  const { width, height } = data.picture;
  grey = greyed(photo, width, height);
  for (const name of ["without", "with"]) {
    labels[name] = unpackLabels(data.labels[name], width * height);
    layers[name] = painted(labels[name], width, height);
  }
  crops = { grey: cropOf(grey), colour: cropOf(photo) };
  fit();
  addEventListener("resize", fit);
  addEventListener("hashchange", () => {
    settings = computedSettings();
    readAddress();
    changed();
  });
}

start();
