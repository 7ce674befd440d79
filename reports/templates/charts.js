"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");

  // Colours of the page, read from its style sheet, so that charts follow the light or dark theme.
  function template() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      gridcolor: colour("--grid"), linecolor: colour("--line"), zeroline: false, automargin: true,
      title: { font: { size: 13, color: colour("--soft") }, standoff: 8 }, tickfont: { color: colour("--soft") },
      minor: { gridcolor: colour("--grid") },
    };
    return {
      layout: {
        font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("--ink") },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        margin: { l: 56, r: 16, t: 12, b: 48 },
        xaxis: axis, yaxis: axis,
        legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom" },
        annotationdefaults: { bgcolor: colour("--card"), opacity: 0.9 },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--line"), activecolor: colour("--soft") },
        hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
      },
    };
  }

  const config = {
    responsive: true, displaylogo: false,
    // Named one by one: Plotly's own choice has a button that sends the chart to a server.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], plotlyServerURL: "",
    toImageButtonOptions: { format: "svg" },
  };
  const narrow = window.matchMedia("(max-width: 600px)");

  // A narrow chart has its legend in a column: it grows by as many lines. It does without traces meant for wide ones.
  function fitted(place, figure) {
    const wanted = (trace) => trace.meta !== "wide" || !narrow.matches;
    const data = figure.data.map((trace) => ({ ...trace, visible: wanted(trace) }));
    const named = data.filter((trace) => trace.visible && trace.name && trace.showlegend !== false);
    const lines = narrow.matches && figure.layout.showlegend !== false && named.length > 1 ? named.length : 0;
    place.style.height = "";
    place.style.height = `${place.clientHeight + 19 * lines}px`;
    return data;
  }
  for (const [name, figure] of Object.entries(figures)) {
    const place = document.getElementById(name);
    const draw = (how) => how(place, fitted(place, figure), { ...figure.layout, template: template() }, config);
    draw(Plotly.newPlot);
    for (const query of [dark, narrow]) query.addEventListener("change", () => draw(Plotly.react));
  }
  window.charts = { template, config, dark };  // for scripts of pages that draw as the reader asks
  document.documentElement.dataset.drawn = String(Object.keys(figures).length);
})();
