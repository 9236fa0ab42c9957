"""Plotly figures in a page: what they draw, and real mouse clicks on their cells and sliders.

A plot is a locator of one `.js-plotly-plot`.
"""

import time

VALUES = """(plot, [trace, key]) => {
  const plain = value => ArrayBuffer.isView(value) || Array.isArray(value) ? Array.from(value, plain)
    : Number.isNaN(value) ? null : value;
  return plot._fullData ? plain(plot._fullData[trace][key]) : null;   // null while it is being made
}"""
PLACE = """(plot, [trace, row, column]) => {   // pixels from the plot's corner to the middle of a cell
  const t = plot._fullData[trace], layout = plot._fullLayout;
  const at = (axis, list, first, step, n) => axis._offset + axis.d2p(list ? list[n] : (first || 0) + n * (step || 1));
  const axis = (id) => layout[id[0] + "axis" + id.slice(1)];
  return [at(axis(t.xaxis), t.x, t.x0, t.dx, column), at(axis(t.yaxis), t.y, t.y0, t.dy, row)];
}"""
DRAWN = ("plot => !!plot._fullData && plot._fullData.length > 0 && !!plot.querySelector('.main-svg') "
         "&& plot.clientWidth > 50")


def drawn(plot):
    """Whether it holds traces and has an area."""
    return plot.evaluate(DRAWN)


def values(plot, trace=0, key="z"):
    """What a trace draws now, as (nested) lists; None where it is blank."""
    return plot.evaluate(VALUES, [trace, key])


def traces(plot, kind):
    """Numbers of the visible traces of a kind, such as "heatmap"."""
    code = "(plot, kind) => (plot._fullData || []).flatMap((t, i) => t.type === kind && t.visible === true ? [i] : [])"
    return plot.evaluate(code, kind)


def layout(plot, path):
    """One value of the full layout, such as "coloraxis.cmax"."""
    return plot.evaluate("(plot, path) => path.split('.').reduce((at, name) => at[name], plot._fullLayout)", path)


def click_cell(plot, row, column, trace=0):
    """Click the middle of a heat map's cell, hovering first as a hand does."""
    plot.scroll_into_view_if_needed()
    plot.page.wait_for_timeout(300)  # JupyterLab lays out again what has come into view
    box, (x, y) = plot.bounding_box(), plot.evaluate(PLACE, [trace, row, column])
    mouse = plot.page.mouse
    mouse.move(box["x"] + x - 3, box["y"] + y - 3)
    mouse.move(box["x"] + x, box["y"] + y, steps=3)
    plot.page.wait_for_timeout(150)  # plotly hovers at most every 50 ms, and a click is a click on what is hovered
    mouse.click(box["x"] + x, box["y"] + y)


def drag_slider(plot, step):
    """Drag a figure's own slider to a step, counted from 0."""
    plot.locator(".slider-rail-touch-rect").scroll_into_view_if_needed()
    grip, rail = (plot.locator(name).bounding_box() for name in (".slider-grip-rect", ".slider-rail-touch-rect"))
    steps = layout(plot, "sliders.0.steps.length")
    margin = grip["width"] / 2
    x, y = rail["x"] + margin + (rail["width"] - 2 * margin) * step / (steps - 1), rail["y"] + rail["height"] / 2
    mouse = plot.page.mouse
    mouse.move(grip["x"] + margin, grip["y"] + grip["height"] / 2)
    mouse.down()
    mouse.move(x, y, steps=4)
    mouse.up()


def wait_until(page, condition, what, seconds=60.0, every=20):
    """Ask every so many ms until condition() holds, and give its value.

    Raises AssertionError with `what`, or what it gives, after `seconds`.
    """
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"{what() if callable(what) else what}: not within {seconds} s"
        page.wait_for_timeout(every)
    return found


def changed(page, look, before):
    """What look() gives once it is something and differs from `before`."""
    return wait_until(page, lambda: (now := look()) != before and now, "what is drawn changes")
