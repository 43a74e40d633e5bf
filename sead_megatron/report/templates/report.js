"use strict";
// Everything that came from a run is set as text, never as markup.

function element(tag, classes, text) {
  const node = document.createElement(tag);
  if (classes) node.className = classes;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Values under the pointer in line charts.

const SVG = "http://www.w3.org/2000/svg";

function hoverable(svg) {
  const data = JSON.parse(svg.dataset.hover);
  const width = svg.viewBox.baseVal.width;
  const cursor = svg.appendChild(document.createElementNS(SVG, "path"));
  cursor.setAttribute("class", "cursor");
  const tooltip = svg.parentNode.appendChild(element("div", "tooltip"));
  tooltip.hidden = true;

  function show(event) {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * width;
    let nearest = 0;
    data.x.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(data.x[nearest] - x)) nearest = i; });
    cursor.setAttribute("d", `M${data.x[nearest]} ${data.top}V${data.bottom}`);
    tooltip.replaceChildren(element("b", "", `step ${data.steps[nearest]}`));
    for (const series of data.series) {
      const point = series.points[nearest];
      if (!point) continue;
      const row = tooltip.appendChild(element("div"));
      row.append(element("i", `chip ${series.colour}`), `${series.name}: ${point[1]}`);
    }
    tooltip.hidden = false;
    const left = (data.x[nearest] / width) * frame.width;
    const beside = left + 12 + tooltip.offsetWidth > frame.width ? left - 12 - tooltip.offsetWidth : left + 12;
    tooltip.style.left = `${Math.max(0, Math.min(beside, frame.width - tooltip.offsetWidth))}px`;
  }

  function hide() {
    cursor.setAttribute("d", "");
    tooltip.hidden = true;
  }

  svg.addEventListener("pointermove", show);
  svg.addEventListener("pointerdown", show);
  svg.addEventListener("pointerleave", hide);
}

document.querySelectorAll("svg[data-hover]").forEach(hoverable);

// Which tokens the zone section is about.

const panelPicker = document.getElementById("panel-picker");
if (panelPicker) {
  panelPicker.addEventListener("change", () => {
    for (const panel of document.querySelectorAll(".panel")) panel.hidden = panel.id !== panelPicker.value;
  });
}

// The rollouts.

const COLUMNS = [
  ["student_entropy", "student entropy"],
  ["teacher_entropy", "teacher entropy"],
  ["forward_kl", "forward KL"],
  ["reverse_kl", "reverse KL"],
  ["logprobs", "logprob"],
];

function viewer() {
  const runs = JSON.parse(document.getElementById("viewer-data").textContent);
  const get = (id) => document.getElementById(id);
  const [runPicker, stepPicker, rolloutPicker] = ["run-picker", "step-picker", "rollout-picker"].map(get);
  const [facts, prompt, box, note, detail] = ["rollout-facts", "rollout-prompt", "tokens", "rollout-note", "token-detail"].map(get);
  const hint = detail.firstElementChild;
  const tooltip = get("viewer").appendChild(element("div", "tooltip"));
  tooltip.hidden = true;
  let rollout = null;
  let chosen = -1;

  function fill(picker, labels, index) {
    picker.replaceChildren(...labels.map((label, i) => new Option(label, i)));
    picker.selectedIndex = Math.min(Math.max(index, 0), labels.length - 1);
  }

  const run = () => runs[runPicker.selectedIndex];
  const step = () => run().steps[stepPicker.selectedIndex];

  function outcome(entry) {
    if (!entry.finished) return "cut";
    return entry.reward === null ? "not graded" : entry.reward ? "right" : "wrong";
  }

  function showRun() {
    fill(stepPicker, run().steps.map((entry) => entry.step), 0);
    showStep(0);
  }

  function showStep(rolloutIndex) {
    if (!step()) return showNothing();
    fill(rolloutPicker, step().rollouts.map((entry, i) => `${i + 1} (${outcome(entry)})`), rolloutIndex);
    get("step-back").disabled = stepPicker.selectedIndex === 0;
    get("step-on").disabled = stepPicker.selectedIndex === run().steps.length - 1;
    showRollout();
  }

  function showNothing() {
    rollout = null;
    for (const node of [rolloutPicker, facts, prompt, box]) node.replaceChildren();
    get("step-back").disabled = get("step-on").disabled = true;
    note.textContent = "This run has no sampled rollouts.";
    detail.replaceChildren(hint);
  }

  function fact(name, value, classes) {
    const node = element("span");
    node.append(element("b", "", name), element("span", classes, value));
    facts.append(node);
  }

  function showRollout() {
    rollout = step().rollouts[rolloutPicker.selectedIndex];
    chosen = -1;
    const result = outcome(rollout);
    facts.replaceChildren();
    fact("Prompt", rollout.id);
    if (rollout.answer !== null) fact("Gold answer", rollout.answer);
    fact("Response", result, result === "right" ? "good" : result === "not graded" ? "" : "bad");
    fact("Tokens", rollout.length.toLocaleString("en"));
    prompt.replaceChildren();
    rollout.prompt.forEach(([role, content], i) => {
      prompt.append(i ? "\n" : "", element("b", "", `${role}: `), content);
    });
    box.replaceChildren(...rollout.texts.map(token));
    box.scrollTop = 0;
    const cut = rollout.length - rollout.texts.length;
    const shown = run().steps.length;
    note.textContent = [
      cut > 0 ? `The first ${rollout.texts.length} tokens; ${cut} more are left out.` : "",
      shown < run().onDisk ? `${shown} of ${run().onDisk} steps' rollouts are in this page.` : "",
      rollout.forward_kl ? "" : "This step has no per-token KL: opacity means nothing.",
    ].join(" ");
    get("no-zones").hidden = rollout.zones !== null;
    get("ramp-end").textContent = step().scale === null ? "not measured" : `${step().scale.toPrecision(2)} nats and more`;
    detail.replaceChildren(hint);
  }

  function token(text, i) {
    const zone = rollout.zones ? rollout.zones[i].toLowerCase() : "none";
    const node = element("span", zone, text === "" ? `⟨${rollout.ids[i]}⟩` : text);
    if (text === "") node.classList.add("special");
    node.dataset.token = i;
    const kl = rollout.forward_kl ? rollout.forward_kl[i] : null;
    if (kl !== null && step().scale) {
      node.style.setProperty("--kl", Math.min(1, 0.08 + 0.92 * Math.sqrt(Math.max(0, kl) / step().scale)).toFixed(3));
    }
    return node;
  }

  function choose(i) {
    if (!rollout || i < 0 || i >= rollout.texts.length) return;
    box.querySelector(".chosen")?.classList.remove("chosen");
    chosen = i;
    const node = box.children[i];
    node.classList.add("chosen");
    const parts = numbers(i);
    parts.unshift(["token", node.textContent, "code"]);
    detail.replaceChildren(
      ...parts.map(([name, value, tag]) => {
        const part = element("span");
        part.append(element("b", "", name), element(tag || "span", "", value));
        return part;
      }),
    );
  }

  function numbers(i) {
    const parts = [["position", i + 1], ["id", rollout.ids[i]], ["zone", rollout.zones ? rollout.zones[i] : "none"]];
    for (const [key, name] of COLUMNS) {
      if (rollout[key]) parts.push([name, rollout[key][i] === null ? "not finite" : `${rollout[key][i]} nats`.replace("-", "−")]);
    }
    return parts;
  }

  // The same numbers beside the pointer; on a touch screen the line below the tokens is enough.
  function showTooltip(node) {
    const table = element("table");
    for (const [name, value] of numbers(Number(node.dataset.token))) {
      const row = table.insertRow();
      row.append(element("th", "", name), element("td", "", value));
    }
    tooltip.replaceChildren(table);
    tooltip.hidden = false;
    const frame = get("viewer").getBoundingClientRect();
    const place = node.getClientRects()[0];
    const left = Math.min(place.left - frame.left, frame.width - tooltip.offsetWidth - 8);
    tooltip.style.left = `${Math.max(8, left)}px`;
    tooltip.style.top = `${place.bottom - frame.top + 6}px`;
  }

  function onToken(event) {
    const node = event.target.closest("[data-token]");
    tooltip.hidden = true;
    if (!node) return;
    choose(Number(node.dataset.token));
    if (event.pointerType === "mouse") showTooltip(node);
  }

  box.addEventListener("pointerover", onToken);
  box.addEventListener("click", onToken);
  box.addEventListener("pointerleave", () => { tooltip.hidden = true; });
  box.addEventListener("scroll", () => { tooltip.hidden = true; });
  box.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(chosen + move);
    box.querySelector(".chosen")?.scrollIntoView({ block: "nearest" });
  });
  runPicker.addEventListener("change", showRun);
  stepPicker.addEventListener("change", () => showStep(rolloutPicker.selectedIndex));
  rolloutPicker.addEventListener("change", showRollout);
  for (const [id, move] of [["step-back", -1], ["step-on", 1]]) {
    get(id).addEventListener("click", () => {
      stepPicker.selectedIndex += move;
      showStep(rolloutPicker.selectedIndex);
    });
  }
  fill(runPicker, runs.map((entry) => entry.name), runs.findIndex((entry) => entry.steps.length));
  showRun();
}

if (document.getElementById("viewer")) viewer();
