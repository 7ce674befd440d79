"use strict";
(() => {
  const { axes, latin, figures, points, start } = JSON.parse(document.getElementById("study").textContent);
  const at = (id) => document.getElementById(id);
  const numeric = axes.map((axis) => axis.values.every((value) => value !== "" && isFinite(value)));
  const place = (axis, value) => (numeric[axis] ? Number(value) : value);
  if (numeric.some(Boolean)) axes.forEach((axis, i) => numeric[i] && axis.values.sort((a, b) => a - b));
  const byValues = new Map(points.map((point, number) => [point.values.join("\n"), number]));
  const lengths = axes.map((axis, i) => (numeric[i] ? axis.values.length : 0));
  const along = lengths.indexOf(Math.max(...lengths));  // the longest axis of numbers, else the first
  const state = { figure: Math.max(0, figures.findIndex((one) => one.key === start)), along, chosen: axes.map(() => 0), number: 0 };

  const text = (value) => {
    if (value === null || value === undefined) return "n/a";
    const size = Math.abs(value);
    if (Number.isInteger(value)) return value.toLocaleString("en-US");
    return value.toLocaleString("en-US", size >= 1000 ? { maximumFractionDigits: 1 } : { maximumSignificantDigits: 4 });
  };
  const element = (tag, properties = {}, ...children) => {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function options(select, labels, chosen) {
    labels.forEach(([label, group], i) => {
      let home = select;
      if (group) {
        home = [...select.children].find((one) => one.label === group) || select.appendChild(element("optgroup", { label: group }));
      }
      home.append(element("option", { value: String(i), textContent: label, selected: i === chosen }));
    });
  }

  function slider(label, most, change) {
    const output = element("output");
    const input = element("input", { type: "range", min: "0", max: String(most), step: "1", value: "0" });
    input.addEventListener("input", () => { change(Number(input.value)); draw(); });
    at("sliders").append(element("label", {}, element("span", { className: "name", textContent: label }), input, output));
    return (value, shown) => { input.value = String(value); output.textContent = shown; };
  }

  const shows = latin
    ? [slider("Point", points.length - 1, (value) => { state.number = value; })]
    : axes.map((axis, i) => slider(axis.path, axis.values.length - 1, (value) => { state.chosen[i] = value; }));
  options(at("figure"), figures.map((one) => [one.label, one.group]), state.figure);
  options(at("along"), axes.map((axis) => [axis.path, ""]), along);
  at("figure").addEventListener("change", (event) => { state.figure = Number(event.target.value); draw(); });
  at("along").addEventListener("change", (event) => { state.along = Number(event.target.value); draw(); });

  const valuesNow = () => axes.map((axis, i) => axis.values[state.chosen[i]]);
  const pointAt = (values) => points[byValues.get(values.join("\n"))];
  const replaced = (values, ...changes) => {
    const other = [...values];
    for (const [i, value] of changes) other[i] = value;
    return other;
  };
  const figureOf = (point) => (point && point.figures ? point.figures[state.figure] : null);
  const halfOf = (point) => (point && point.half ? point.half[state.figure] : null);
  const fixedText = (without) => axes.map((axis, i) => [axis.path, axis.values[state.chosen[i]], i])
    .filter(([, , i]) => !without.includes(i)).map(([path, value]) => `${path} = ${value}`).join(", ");

  function axisLayout(i, title) {
    const layout = { title: { text: title } };
    if (!numeric[i]) return { ...layout, type: "category" };
    const values = axes[i].values.map(Number);
    const spread = values[0] > 0 && values[values.length - 1] / values[0] >= 8;
    const own = values.length <= 9 && !latin ? { tickvals: values, ticktext: axes[i].values } : {};
    return { ...layout, ...own, type: spread ? "log" : "linear" };
  }

  function drawLine(label) {
    const i = state.along, values = valuesNow();
    const shown = latin
      ? [...points].sort((a, b) => a.values[i] - b.values[i])
      : axes[i].values.map((value) => pointAt(replaced(values, [i, value])));
    const x = shown.map((point) => place(i, point.values[i]));
    const main = {
      type: "scatter", mode: latin || !numeric[i] ? "markers" : "lines+markers", x, y: shown.map(figureOf), name: label,
      line: { color: "#0072B2", width: 2 }, marker: { color: "#0072B2", size: latin ? 7 : numeric[i] ? 6 : 10 },
      hovertemplate: `%{x}: %{y:,.5~g}<extra></extra>`,
    };
    if (shown.some((point) => halfOf(point) !== null)) {
      main.error_y = { type: "data", array: shown.map((point) => halfOf(point) || 0), color: "#0072B2", thickness: 1.2, width: 4 };
    }
    const here = latin ? points[state.number] : pointAt(values);
    const marker = {
      type: "scatter", mode: "markers", x: [place(i, here.values[i])], y: [figureOf(here)], hoverinfo: "skip",
      marker: { color: "#D55E00", size: 13, symbol: "circle-open", line: { width: 3 } },
    };
    const layout = {
      xaxis: axisLayout(i, axes[i].path), yaxis: { title: { text: label }, rangemode: "tozero" },
      showlegend: false, hovermode: "closest",
    };
    Plotly.react("line", [main, marker], { ...layout, template: window.charts.template() }, window.charts.config);
    const fixed = latin ? "" : fixedText([i]);
    at("line-caption").textContent = `${label}${fixed ? ", with " + fixed : ""}. The ring is the chosen point.`;
  }

  function drawMap(label) {
    if (!at("map")) return;
    const i = state.along, j = i === 0 ? 1 : 0, values = valuesNow();
    const z = axes[j].values.map((other) => axes[i].values.map((value) => figureOf(pointAt(replaced(values, [i, value], [j, other])))));
    const cells = {
      type: "heatmap", x: axes[i].values, y: axes[j].values, z, colorscale: "Cividis", hoverongaps: false,
      xgap: 2, ygap: 2, colorbar: { thickness: 12, outlinewidth: 0 }, hovertemplate: "%{x}, %{y}: %{z:,.5~g}<extra></extra>",
    };
    if (axes[i].values.length * axes[j].values.length <= 42) {
      cells.text = z.map((row) => row.map((value) => (value === null ? "" : text(Number(value.toPrecision(3))))));
      cells.texttemplate = "%{text}";
    }
    const [x, y] = [state.chosen[i], state.chosen[j]];
    const here = { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: "#D55E00", width: 3 } };
    const layout = {
      xaxis: { title: { text: axes[i].path }, type: "category", showgrid: false },
      yaxis: { title: { text: axes[j].path }, type: "category", showgrid: false },
      showlegend: false, hovermode: "closest", plot_bgcolor: colour("--grid"), shapes: [here],
    };
    Plotly.react("map", [cells], { ...layout, template: window.charts.template() }, window.charts.config);
    const fixed = fixedText([i, j]);
    at("map-caption").textContent = `${label}${fixed ? ", with " + fixed : ""}. Empty cells cannot be simulated.`;
  }

  function drawPoint() {
    const point = latin ? points[state.number] : pointAt(valuesNow());
    at("chosen-title").textContent = axes.map((axis, i) => `${axis.path.split(".").pop()} ${point.values[i]}`).join(", ");
    at("chosen-about").textContent = point.error || "";
    const groups = new Map();
    figures.forEach((one, k) => {
      if (!point.figures) return;
      const half = point.half && point.half[k] !== null ? ` ± ${text(Number(point.half[k].toPrecision(2)))}` : "";
      const why = point.refused && point.refused[k] ? point.refused[k] : text(point.figures[k]) + half;
      const row = element("tr", {}, element("th", { scope: "row", textContent: one.label }), element("td", { className: "n", textContent: why }));
      groups.set(one.group, [...(groups.get(one.group) || []), row]);
    });
    at("chosen").replaceChildren(...[...groups].map(([group, rows]) => element(
      "table", { className: "numbers" }, element("caption", { textContent: group }), element("tbody", {}, ...rows),
    )));
    if (latin) shows[0](state.number, `${state.number + 1} of ${points.length}`);
    else shows.forEach((show, i) => show(state.chosen[i], axes[i].values[state.chosen[i]]));
  }

  function draw() {
    const label = figures.length ? figures[state.figure].label : "";
    drawPoint();
    drawLine(label);
    drawMap(label);
    document.documentElement.dataset.drawn = String(document.querySelectorAll(".chart").length);
  }
  if (at("map")) {
    Plotly.newPlot("map", [], {}).then((map) => map.on("plotly_click", ({ points: [hit] }) => {
      const i = state.along, j = i === 0 ? 1 : 0;
      state.chosen[i] = axes[i].values.indexOf(String(hit.x));
      state.chosen[j] = axes[j].values.indexOf(String(hit.y));
      draw();
    }));
  }
  draw();
  window.charts.dark.addEventListener("change", draw);
})();
