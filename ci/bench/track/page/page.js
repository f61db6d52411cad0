// Choosing the machine class and the view, hovering, and zooming. Everything that is shown is read from the charts'
// paths and the tables' rows, which the page holds without this script as well.
"use strict";
(() => {
  const HEIGHT = 1000;
  const NAME = 0.1; // share of the height that a peer's name takes
  const MANY = 150; // commits from which on dots are drawn small
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = $("#tip");
  const windows = new Map(); // section -> [first, last] commit shown

  // --- reading what the page holds ---

  const rowsOf = new WeakMap();
  function rows(table) {
    if (!rowsOf.has(table)) {
      const cells = (row) => [...row.children].map((cell) => cell.textContent.trim());
      rowsOf.set(table, new Map($$("tbody tr", table).map((row) => [Number(row.dataset.x), cells(row)])));
    }
    return rowsOf.get(table);
  }
  const section = (element) => element.closest(".machine");
  const count = (machine) => Math.max(1, Number(machine.dataset.commits));
  const shown = (machine) => windows.get(machine) || [0, count(machine) - 1];
  const pairs = (path) => [...path.getAttribute("d").matchAll(/M(-?[\d.]+) (-?[\d.]+)(?:V(-?[\d.]+))?/g)];

  function describe(plot, x) {
    const figure = plot.closest(".figure");
    const cells = rows($(".table table", figure)).get(x);
    const commit = rows($(".commits", section(plot))).get(x);
    const ratio = plot.parentElement.classList.contains("ratio");
    const told = { figure: "no record", detail: "", commit: `${commit[0]}, ${commit[1]}`, subject: commit[2] };
    if (cells && cells.length === 2) told.figure = cells[1];
    if (cells && cells.length > 2) {
      const value = `${cells[1]} ${figure.dataset.unit}`;
      told.figure = ratio && cells[3] ? `${cells[3]} to ${cells[5]}` : value;
      const ends = ratio && cells[3] ? cells[4] : cells[2];
      const other = ratio ? value : cells[3] ? `${cells[3]} to ${cells[5]}` : "";
      told.detail = [ends && `95 %: ${ends}`, other, `samples (runs): ${cells[6]}`].filter(Boolean).join("; ");
    }
    return told;
  }

  // --- hovering and the keyboard ---

  function place(plot, x) {
    const [first, last] = shown(section(plot));
    return (x - first + 0.5) / (last - first + 1);
  }
  function under(plot, event) {
    const box = plot.getBoundingClientRect();
    const [first, last] = shown(section(plot));
    const x = Math.floor(first + ((event.clientX - box.left - 1) / (box.width - 1)) * (last - first + 1));
    return Math.min(Math.max(x, first), last);
  }
  function point(plot, x) {
    const told = describe(plot, x);
    const box = plot.getBoundingClientRect();
    const left = place(plot, x) * box.width;
    const cursor = $(".cursor", plot);
    cursor.style.left = `${left}px`;
    cursor.hidden = false;
    const lines = [["b", told.figure], ["span", told.detail], ["span", told.commit], ["span", told.subject]];
    tip.replaceChildren(...lines.filter(([, text]) => text).map(([name, text]) => {
      const line = document.createElement(name);
      line.textContent = text;
      return line;
    }));
    tip.hidden = false;
    const size = tip.getBoundingClientRect();
    const beside = box.left + left + 14;
    const over = beside + size.width > innerWidth - 8;
    tip.style.left = `${Math.max(8, over ? box.left + left - size.width - 14 : beside)}px`;
    tip.style.top = `${Math.max(8, Math.min(box.top + 8, innerHeight - size.height - 8))}px`;
    plot.setAttribute("aria-valuenow", x);
    plot.setAttribute("aria-valuetext", [told.commit, told.figure, told.detail, told.subject].filter(Boolean).join(", "));
  }
  function leave(plot) {
    tip.hidden = true;
    $(".cursor", plot).hidden = true;
  }
  function key(plot, event) {
    const machine = section(plot);
    const [first, last] = shown(machine);
    const at = Math.min(Math.max(Number(plot.getAttribute("aria-valuenow")), first), last);
    const steps = { ArrowLeft: at - 1, ArrowDown: at - 1, ArrowRight: at + 1, ArrowUp: at + 1, Home: first, End: last };
    const width = last - first + 1;
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in steps) point(plot, Math.min(Math.max(steps[event.key], first), last));
    else if (event.key === "+" || event.key === "=") around(machine, at, Math.ceil(width / 2));
    else if (event.key === "-") around(machine, at, width * 2);
    else if (event.key === "Escape") show(machine, 0, count(machine) - 1);
    else return;
    event.preventDefault();
  }
  function around(machine, at, width) {
    const whole = count(machine);
    const size = Math.min(Math.max(width, 2), whole);
    const first = Math.min(Math.max(at - Math.floor(size / 2), 0), whole - size);
    show(machine, first, first + size - 1);
  }

  // --- zooming ---

  function ticks(low, high) {
    const rough = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((s) => s * power).find((s) => s >= rough * (1 - 1e-9));
    const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    const found = [];
    for (let n = Math.ceil(low / step); n <= Math.floor(high / step); n++) {
      found.push([n * step, Math.abs(n * step).toLocaleString("en", { minimumFractionDigits: decimals, maximumFractionDigits: decimals })]);
    }
    return found;
  }
  function label(value, text, ratio) {
    const zero = !/[1-9]/.test(text);
    const sign = zero ? "" : value < 0 ? "\u2212" : ratio ? "+" : "";
    return sign + text + (ratio ? "\u00a0%" : "");
  }
  // The heights that the commits shown take, with a margin; all of the chart where all commits are shown.
  function heights(chart, first, last, whole) {
    if (whole) return [0, HEIGHT];
    const within = (found) => Number(found[1]) >= first && Number(found[1]) <= last;
    const dots = pairs($(".dots", chart)).filter(within).map((found) => Number(found[2]));
    const ends = pairs($(".bars", chart)).filter(within).flatMap((found) => [Number(found[2]), Number(found[3])]);
    if (!dots.length) return [0, HEIGHT];
    const [top, bottom] = [Math.min(...dots), Math.max(...dots)];
    const reach = Math.max(bottom - top, 20);
    const up = Math.max(Math.min(top, ...ends), top - reach), down = Math.min(Math.max(bottom, ...ends), bottom + reach);
    const margin = Math.max((down - up) * 0.1, 5);
    return [up - margin, down + margin];
  }
  function draw(chart, first, last, whole) {
    const size = last - first + 1;
    const [top, bottom] = heights(chart, first, last, whole);
    const down = (y) => (y - top) / (bottom - top);
    $("svg", chart).setAttribute("viewBox", `${first - 0.5} ${top} ${size} ${bottom - top}`);
    chart.classList.toggle("many", size > MANY);
    const low = Number(chart.dataset.low), high = Number(chart.dataset.high);
    const value = (y) => high - (y / HEIGHT) * (high - low);
    const marks = ticks(value(bottom), value(top)).map(([v, text]) => [(high - v) / (high - low) * HEIGHT, label(v, text, chart.classList.contains("ratio"))]);
    $(".grid", chart).setAttribute("d", marks.map(([y]) => `M${first - 0.5} ${y}H${last + 0.5}`).join(""));
    const floor = bottom - 0.03 * (bottom - top);
    $(".missing", chart).setAttribute("d", pairs($(".missing", chart)).map(([, x]) => `M${x} ${floor}z`).join(""));
    $(".ticks", chart).replaceChildren(...marks.map(([y, text]) => {
      const span = document.createElement("span");
      span.style.top = `${down(y) * 100}%`;
      span.textContent = text;
      return span;
    }));
    let above = 0; // names of peers stand from the top down, none over the other
    for (const name of $$(".peername", chart)) {
      const y = down(Number(name.dataset.y));
      name.hidden = y < 0 || y > 1;
      if (!name.hidden) above = Math.max(y, above + NAME);
      name.style.top = `${above * 100}%`;
    }
    for (const flag of $$(".flag", chart)) {
      const x = Number(flag.dataset.x);
      flag.style.left = `${((x - first) / size) * 100}%`;
      flag.hidden = x < first || x > last;
    }
    commits(chart, first, last);
  }
  function commits(chart, first, last) {
    const held = rows($(".commits", section(chart)));
    const size = last - first + 1;
    const number = Math.min(5, size);
    const places = [...new Set(Array.from({ length: number }, (_, i) => first + Math.floor((i * (size - 1)) / Math.max(number - 1, 1))))];
    $(".commits-axis", chart).replaceChildren(...places.filter((x) => held.has(x)).map((x) => {
      const span = document.createElement("span");
      const at = (x - first + 0.5) / size;
      span.style.left = `${at * 100}%`;
      if (size > 1) span.className = at < 0.1 ? "first" : at > 0.9 ? "last" : "";
      span.append(held.get(x)[0], document.createElement("br"), held.get(x)[1].slice(0, 6));
      return span;
    }));
  }
  function show(machine, first, last) {
    windows.set(machine, [first, last]);
    const whole = first === 0 && last === count(machine) - 1;
    for (const chart of $$(".chart", machine)) draw(chart, first, last, whole);
    for (const button of $$("[data-last]")) {
      const size = Number(button.dataset.last) || count(machine);
      const pressed = last === count(machine) - 1 && first === Math.max(0, last - size + 1) && (Number(button.dataset.last) === 0) === whole;
      button.setAttribute("aria-pressed", pressed);
    }
    tip.hidden = true;
  }

  // --- what happens where ---

  function listen(plot) {
    let start = null;
    const chosen = $(".chosen", plot);
    plot.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      start = under(plot, event);
      plot.setPointerCapture(event.pointerId);
    });
    plot.addEventListener("pointermove", (event) => {
      const x = under(plot, event);
      point(plot, x);
      if (start === null || start === x) return;
      const [left, right] = [Math.min(start, x), Math.max(start, x)];
      const [first, last] = shown(section(plot));
      chosen.style.left = `${((left - first) / (last - first + 1)) * 100}%`;
      chosen.style.width = `${((right - left + 1) / (last - first + 1)) * 100}%`;
      chosen.hidden = false;
    });
    plot.addEventListener("pointerup", (event) => {
      const x = under(plot, event);
      if (start !== null && start !== x) show(section(plot), Math.min(start, x), Math.max(start, x));
      start = null;
      chosen.hidden = true;
    });
    plot.addEventListener("pointercancel", () => { start = null; chosen.hidden = true; });
    plot.addEventListener("pointerleave", () => leave(plot));
    plot.addEventListener("dblclick", () => show(section(plot), 0, count(section(plot)) - 1));
    plot.addEventListener("blur", () => leave(plot));
    plot.addEventListener("keydown", (event) => key(plot, event));
  }
  function choose(id) {
    for (const machine of $$(".machine")) machine.hidden = machine.id !== id;
    const machine = document.getElementById(id);
    show(machine, ...shown(machine));
  }

  const chooser = $("#machine");
  if (!chooser) return;
  $(".controls").hidden = false;
  chooser.addEventListener("change", () => choose(chooser.value));
  for (const radio of $$("[name=view]")) {
    radio.addEventListener("change", () => { document.body.dataset.view = radio.value; });
  }
  for (const button of $$("[data-last]")) {
    button.addEventListener("click", () => {
      const machine = document.getElementById(chooser.value);
      const last = count(machine) - 1;
      show(machine, Math.max(0, last - (Number(button.dataset.last) || last + 1) + 1), last);
    });
  }
  $$(".plot").forEach(listen);
  choose(chooser.value);
  document.body.dataset.ready = "yes"; // the script ran to its end
})();
