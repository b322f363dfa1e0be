"use strict";
(() => {
  document.body.classList.add("scripted");
  const find = (selector, within = document) => within.querySelector(selector);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const AT_ONCE = 8;

  // ---- the atlas: sorted and filtered; what is chosen stands in the address, so that a view can be passed on
  const atlas = find("#entries");
  const control = { sort: find("#sort"), class: find("#class"), loss: find("#loss") };
  let shown = AT_ONCE;

  const number = (entry, key) => Number(entry.dataset[key]);
  const overlap = (entry) => JSON.parse(entry.dataset.iou)[control.class.value] ?? 2;
  const orders = {
    loss: (a, b) => number(b, "loss") - number(a, "loss"),
    accuracy: (a, b) => number(a, "accuracy") - number(b, "accuracy"),
    entropy: (a, b) => number(b, "entropy") - number(a, "entropy"),
    class: (a, b) => overlap(a) - overlap(b),
    name: (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, { numeric: true }),
  };

  function arrange() {
    const chosen = control.class.value;
    const byClass = find('option[value="class"]', control.sort);
    byClass.disabled = chosen === "";
    if (byClass.disabled && control.sort.value === "class") control.sort.value = "loss";
    const least = Number(control.loss.value);
    const entries = all("article", atlas).sort((a, b) => orders[control.sort.value](a, b) || number(a, "rank") - number(b, "rank"));
    const fitting = entries.filter((entry) => number(entry, "loss") >= least && (chosen === "" || chosen in JSON.parse(entry.dataset.iou)));
    entries.forEach((entry) => { entry.hidden = true; });
    fitting.slice(0, shown).forEach((entry) => { entry.hidden = false; });
    atlas.append(...entries);
    find("#least").textContent = least.toFixed(2);
    find("#count").textContent = `${Math.min(shown, fitting.length)} of ${fitting.length} images shown`;
    find("#more").hidden = fitting.length <= shown;
  }

  function remember() {
    const state = new URLSearchParams({ sort: control.sort.value, class: control.class.value, loss: control.loss.value });
    try { history.replaceState(null, "", `#${state}`); } catch { /* some viewers of local files forbid it; the view works all the same */ }
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const [key, element] of Object.entries(control)) {
      const value = state.get(key);
      if (value === null) continue;
      if (element.tagName === "SELECT" && !all("option", element).some((option) => option.value === value)) continue;
      element.value = value;
    }
  }

  if (atlas) {
    Object.values(control).forEach((element) => element.addEventListener("input", () => { shown = AT_ONCE; arrange(); remember(); }));
    find("#more").addEventListener("click", () => { shown += AT_ONCE; arrange(); });
    addEventListener("hashchange", () => { if (location.hash.includes("=")) { recall(); arrange(); } });
    recall();
    arrange();
  }

  // ---- truth and prediction compared over the image
  const dialog = find("#compare");
  const stage = find(".panel", dialog);
  const [truth, guess] = all("img", stage);
  const edge = find(".edge", stage);
  const split = find("#split");
  const opacity = find("#opacity");
  const names = JSON.parse(find("#classes").textContent); // "red,green,blue" -> name
  let current = null;
  let pixels = [];

  function place() {
    const at = Number(split.value);
    guess.style.clipPath = `inset(0 0 0 ${at}%)`;
    truth.style.clipPath = `inset(0 ${100 - at}% 0 0)`;
    edge.style.left = `${at}%`;
    truth.style.opacity = guess.style.opacity = String(Number(opacity.value) / 100);
  }

  async function read(image) {
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    return context;
  }

  function open(article) {
    current = article;
    const source = find(".panels .panel", article);
    stage.style.setProperty("--photo", getComputedStyle(article).getPropertyValue("--photo"));
    stage.style.setProperty("--shape", source.dataset.shape);
    dialog.style.setProperty("--shape", source.dataset.shape);
    stage.style.aspectRatio = source.style.aspectRatio;
    truth.src = find(".truth img", article).src;
    guess.src = find(".guess img", article).src;
    find("h2", dialog).textContent = article.dataset.name;
    find("#below").textContent = "Point at the image, or go to it by Tab and move by arrow keys, to read the classes there.";
    pixels = [];
    Promise.all([read(truth), read(guess)]).then((contexts) => { if (current === article) pixels = contexts; }, () => { pixels = []; });
    place();
    if (!dialog.open) dialog.showModal();
  }

  function step(by) {
    const list = all("article[data-iou]:not([hidden])");
    open(list[(list.indexOf(current) + by + list.length) % list.length]);
  }

  function point(event) {
    const box = stage.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width;
    const y = (event.clientY - box.top) / box.height;
    if (event.buttons) { split.value = String(100 * x); place(); }
    tell(x, y);
  }

  const STEP = 1 / 64; // of the image, for each press of an arrow key
  const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  const cursor = find(".cursor", stage);
  const at = { x: 0.5, y: 0.5 };

  function move([right, down]) {
    at.x = Math.min(Math.max(at.x + right * STEP, 0), 1 - STEP / 2);
    at.y = Math.min(Math.max(at.y + down * STEP, 0), 1 - STEP / 2);
    cursor.style.left = `${100 * at.x}%`;
    cursor.style.top = `${100 * at.y}%`;
    tell(at.x, at.y);
  }

  function tell(x, y) {
    if (pixels.length !== 2 || x < 0 || y < 0 || x >= 1 || y >= 1) return;
    const [known, found] = pixels.map((context) => {
      const [red, green, blue, alpha] = context.getImageData(Math.floor(x * context.canvas.width), Math.floor(y * context.canvas.height), 1, 1).data;
      return alpha ? names[`${red},${green},${blue}`] ?? "?" : "not labelled";
    });
    find("#below").textContent = `truth: ${known}\u2003prediction: ${found}`;
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.compare");
    if (button) open(button.closest("article"));
  });
  split.addEventListener("input", place);
  opacity.addEventListener("input", place);
  stage.addEventListener("pointermove", point);
  stage.addEventListener("pointerdown", point);
  stage.addEventListener("focus", () => move([0, 0]));
  stage.addEventListener("keydown", (event) => {
    if (!(event.key in MOVES)) return;
    event.preventDefault(); // the dialog would scroll
    move(MOVES[event.key]);
  });
  find("#previous").addEventListener("click", () => step(-1));
  find("#next").addEventListener("click", () => step(1));
  find("#close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "n") step(1);
    if (event.key === "p") step(-1);
  });
})();
