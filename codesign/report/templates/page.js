"use strict";
// Everything shown here comes from the data block; text is only ever set as text, never parsed as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (className) node.className = className;
    return node;
  };

  // ---- Figures -------------------------------------------------------------------------------------------------
  const DARK = {
    "#22262B": "#E6E9ED", "#D9DDE3": "#363C44", "#8A8F98": "#969DA8", "#0072B2": "#56B4E9", "#D55E00": "#F08B48",
    "#009E73": "#3CC99C", "#ffffff": "#14171B",
  };
  const darkQuery = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const themed = (figure) => {
    const text = JSON.stringify(figure);
    const isDark = darkQuery.matches && !printing;
    return JSON.parse(isDark ? text.replace(/#[0-9A-Fa-f]{6}/g, (colour) => DARK[colour] || colour) : text);
  };
  const CONFIG = { displayModeBar: false, responsive: true, showTips: false };
  // A point's text: plotly understands a subset of HTML in labels, so markup is escaped.
  const plotText = (text) =>
    text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, " ");
  const wrapped = (text, width) => {
    const lines = [""];
    for (const word of text.split(" ")) {
      if (lines[lines.length - 1].length + word.length > width) lines.push("");
      lines[lines.length - 1] += (lines[lines.length - 1] ? " " : "") + word;
    }
    return lines.map(plotText).join("<br>");
  };

  function drawScatter() {
    const figure = themed(data.figure);
    const [x, y] = [byId("x-axis").value, byId("y-axis").value];
    const [logX, logY] = [byId("x-log").checked, byId("y-log").checked];
    let missing = 0;
    for (const trace of figure.data) {
      const source = data.studies[trace.meta.study];
      const column = (name) => source.metrics[name] || { value: [], low: [], high: [], text: [] };
      const [across, up] = [column(x), column(y)];
      const drawable = (i) => {
        const [a, b] = [across.value[i], up.value[i]];
        return a != null && b != null && !(logX && a <= 0) && !(logY && b <= 0);
      };
      if (trace.meta.role === "line") {
        const line = (source.lines[x + "|" + y] || []).filter(drawable);
        trace.x = line.map((i) => across.value[i]);
        trace.y = line.map((i) => up.value[i]);
        trace.line.shape = data.axes[x].step;
        continue;
      }
      const rows = trace.meta.rows.filter(drawable);
      missing += trace.meta.rows.length - rows.length;
      trace.customdata = rows.map((i) => source.anchors[i]);
      trace.x = rows.map((i) => across.value[i]);
      trace.y = rows.map((i) => up.value[i]);
      trace.hovertext = rows.map((i) =>
        [wrapped(source.titles[i], 60), plotText(x + ": " + across.text[i]), plotText(y + ": " + up.text[i])].join("<br>"));
      const bars = (old, axis) => ({
        ...old,
        array: rows.map((i) => (axis.high[i] == null ? 0 : axis.high[i] - axis.value[i])),
        arrayminus: rows.map((i) => (axis.low[i] == null ? 0 : axis.value[i] - axis.low[i])),
      });
      if (trace.meta.bars) {
        trace.error_x = bars(trace.error_x, across);
        trace.error_y = bars(trace.error_y, up);
      }
    }
    for (const [axis, name, isLog] of [[figure.layout.xaxis, x, logX], [figure.layout.yaxis, y, logY]]) {
      axis.title.text = data.axes[name].title;
      axis.type = isLog ? "log" : "linear";
    }
    byId("scatter-note").textContent = missing
      ? missing + " measured trial" + (missing > 1 ? "s are" : " is") + " not drawn: without a value on these axes" +
        (logX || logY ? ", or zero on a logarithmic one." : ".")
      : "";
    return Plotly.react("scatter", figure.data, figure.layout, CONFIG);
  }

  function drawAll() {
    if (data.figure) drawScatter();
    if (data.payoff) {
      const figure = themed(data.payoff);
      Plotly.react("payoff-figure", figure.data, figure.layout, CONFIG);
    }
  }

  function startFigures() {
    const script = make("script", byId("plotly").textContent); // runs here; the policy knows its hash
    document.head.append(script);
    drawAll();
    performance.mark("figures drawn");
    for (const id of ["x-axis", "y-axis", "x-log", "y-log"]) byId(id).addEventListener("change", drawScatter);
    darkQuery.addEventListener("change", drawAll);
    addEventListener("beforeprint", () => { printing = true; drawAll(); });
    addEventListener("afterprint", () => { printing = false; drawAll(); });
    byId("scatter").on("plotly_click", (event) => {
      if (event.points[0].customdata != null) show(Number(event.points[0].customdata));
    });
  }
  // Plotly takes a second to load: the text and the table come first.
  if (data.figure) addEventListener("load", () => requestAnimationFrame(() => setTimeout(startFigures)));

  // ---- The table of trials -------------------------------------------------------------------------------------
  const table = byId("trials");
  const body = table ? table.tBodies[0] : undefined;
  const rows = table ? [...body.rows] : [];
  const panels = new Map();

  function place() {
    for (const [row, panel] of panels) {
      panel.hidden = row.hidden;
      row.after(panel);
    }
  }

  function sortBy(cell) {
    const descending = cell.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    cell.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const key = (row) => row.cells[cell.cellIndex].dataset.v;
    const isNumber = rows.every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
    const sorted = rows.slice().sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === "" || right === "") return (left === "") - (right === ""); // what was not measured comes last
      const order = isNumber ? left - right : left.localeCompare(right);
      return descending ? -order : order;
    });
    body.append(...sorted);
    place();
  }

  function filter() {
    const [kind, words] = [byId("filter-kind").value, byId("filter-text").value.toLowerCase().split(" ")];
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !((kind === "all" || row.dataset.kinds.split(" ").includes(kind)) && words.every((w) => text.includes(w)));
      shown += !row.hidden;
    }
    byId("filter-count").textContent = shown + " of " + rows.length + " trials";
    place();
  }

  function pairs(title, object) {
    const entries = Object.entries(object);
    if (!entries.length) return [];
    const grid = make("table");
    for (const [name, value] of entries) {
      const line = grid.insertRow();
      line.append(make("th", name), make("td", typeof value === "string" ? value : JSON.stringify(value)));
    }
    return [make("h4", title), grid];
  }

  function panelOf(index) {
    const trial = data.details[index];
    const line = make("tr", undefined, "detail");
    const cell = line.insertCell();
    cell.colSpan = table.tHead.rows[0].cells.length;
    const panel = make("div", undefined, "panel");
    const [left, right] = [make("div"), make("div")];
    panel.append(make("h3", trial.title));
    if (trial.failure) panel.append(make("h4", "Failed: " + trial.kind), make("pre", trial.failure, "failure"));
    for (const warning of trial.warnings) panel.append(make("p", warning, "warn"));
    left.append(...pairs("Metrics", trial.metrics), ...pairs("Against the unmodified configuration", trial.changes));
    left.append(...pairs("Limits", trial.violations));
    left.append(make("h4", "Configuration"), make("pre", trial.config));
    right.append(...pairs("Bytes by part", trial.bytes), ...pairs("Phases", trial.phases), ...pairs("Kernels", trial.kernels));
    right.append(...pairs("Speculation", trial.speculation));
    right.append(...pairs("Resolved by the build", trial.resolved), ...pairs("Monitor", trial.monitor));
    right.append(...pairs("What the numbers rest on", trial.trust), ...pairs("Provenance", trial.provenance));
    const columns = make("div", undefined, "columns");
    columns.append(left, right);
    panel.append(columns, make("h4", "Measure it again, or take it away"), make("pre", trial.commands));
    panel.append(make("p", "Record: trials/" + trial.uid + ".json", "small soft"));
    cell.append(panel);
    return line;
  }

  function toggle(index, open) {
    const row = rows[index];
    const button = row.querySelector("button");
    if (panels.has(row) && !open) {
      panels.get(row).remove();
      panels.delete(row);
    } else if (!panels.has(row)) {
      panels.set(row, panelOf(index));
      place();
    }
    button.setAttribute("aria-expanded", String(panels.has(row)));
  }

  function show(index) {
    if (rows[index].hidden) {
      byId("filter-kind").value = "all";
      byId("filter-text").value = "";
      filter();
    }
    toggle(index, true);
    rows[index].scrollIntoView({ block: "start" });
  }

  if (!table) return;
  for (const cell of table.tHead.rows[0].cells) cell.firstElementChild.addEventListener("click", () => sortBy(cell));
  rows.forEach((row, index) => row.querySelector("button").addEventListener("click", () => toggle(index, false)));
  byId("filter-kind").addEventListener("change", filter);
  byId("filter-text").addEventListener("input", filter);
  for (const link of document.querySelectorAll("a[data-row]")) {
    link.addEventListener("click", (event) => { event.preventDefault(); show(Number(link.dataset.row)); });
  }
  const wanted = /^#trial-(\d+)$/.exec(location.hash);
  if (wanted) rows.forEach((row, index) => { if (row.dataset.number === wanted[1]) show(index); });
})();
