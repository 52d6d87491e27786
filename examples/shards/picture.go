//go:build !plan9

package main

import (
	"bytes"
	"fmt"
)

// style is the style of all pictures: GitHub's colors, light and dark.
const style = `  <style>
    text { font: 13px -apple-system, BlinkMacSystemFont, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328; text-anchor: middle }
    .name { font-size: 14px; font-weight: 600 }
    .mute { font-size: 12px; fill: #59636e }
    .small { font-size: 11px }
    .right { text-anchor: end }
    .panel { fill: #f6f8fa; stroke: #d1d9e0 }
    .full { fill: #0969da }
    .base { stroke: #818b98 }
    .ceil { stroke: #9a6700; stroke-width: 1.5; stroke-dasharray: 4 3 }
    text.ceil { fill: #9a6700; stroke: none; font-size: 12px }
    .lost { fill: #cf222e }
    @media (prefers-color-scheme: dark) {
      text { fill: #f0f6fc }
      .mute { fill: #9da5ae }
      .panel { fill: #151b23; stroke: #3d444d }
      .full { fill: #4493f8 }
      .base { stroke: #7d8590 }
      .ceil { stroke: #d29922 }
      text.ceil { fill: #d29922 }
      .lost { fill: #f85149 }
    }
  </style>
`

// draw returns a picture of the two outcomes, with one bar for each queue.
func draw(one, many outcome) []byte {
	const (
		width, height = 720, 332
		base          = 274.5 // the lower end of the bars
		full          = 154.0 // the height of a queue that is full
		left, right   = 24.5, 695.5
		oneAt, oneTo  = left, 205.5
		manyAt        = 230.5
	)
	var b bytes.Buffer
	p := func(format string, args ...any) { fmt.Fprintf(&b, "  "+format+"\n", args...) }
	capacity, limit := one.queues[0].Capacity, one.queues[0].Limit
	n := len(many.queues)

	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" role="img" aria-labelledby="title desc">`+"\n", width, height)
	p(`<title id="title">One listener compared with %d shards, while the server is stalled</title>`, n)
	p(`<desc id="desc">%d clients connect to a server that does not accept. One listener has one queue, which holds %d: %s, %s. %d shards on one port have %[5]d queues: %[6]s, %[7]s.</desc>`,
		one.clients, capacity, gotIn(one), turnedAway(one), n, gotIn(many), turnedAway(many))
	b.WriteString(style)
	b.WriteByte('\n')
	p(`<rect class="panel" x=".5" y=".5" width="%d" height="%d" rx="10"/>`, width-1, height-1)

	group := func(name string, o outcome, from, to float64) {
		middle := (from + to) / 2
		p(`<text class="name" x="%g" y="34">%s</text>`, middle, name)
		p(`<text x="%g" y="54">%s</text>`, middle, gotIn(o))
		class := "mute"
		if o.in < o.clients {
			class = "lost"
		}
		p(`<text class="%s" x="%g" y="74">%s</text>`, class, middle, turnedAway(o))
		p(`<path class="base" d="M%g %gH%g"/>`, from, base, to)
		step := (to - from) / float64(len(o.queues))
		thick := min(step*0.7, 24)
		for i, q := range o.queues {
			x := from + step*(float64(i)+0.5)
			h := full * float64(q.Queued) / float64(capacity)
			p(`<rect class="full" x="%.1f" y="%.1f" width="%.1f" height="%.1f"/>`, x-thick/2, base-h, thick, h)
			if len(o.queues) <= 20 { // otherwise the numbers overlap
				p(`<text class="small" x="%.1f" y="%.1f">%d</text>`, x, base-h-5, q.Queued)
			}
		}
	}
	group("1 listener", one, oneAt, oneTo)
	group(fmt.Sprintf("%d shards on one port", n), many, manyAt, right)
	p(`<path class="ceil" d="M%g %gH%g"/>`, left, base-full, right)
	p(`<text class="ceil right" x="%g" y="%g">limit %d: each queue holds %d</text>`, right, base-full-6, limit, capacity)
	p(`<text class="mute" x="%g" y="%g">clients that wait in each accept queue while the server is stalled</text>`, width/2.0, base+34)
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func gotIn(o outcome) string { return fmt.Sprintf("%d of %d clients get in", o.in, o.clients) }

func turnedAway(o outcome) string {
	if o.in < o.clients {
		return fmt.Sprintf("%d are turned away", o.clients-o.in)
	}
	return "none is turned away"
}
