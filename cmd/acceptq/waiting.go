package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/acceptq/acceptq"
)

// waiting lists the clients that the listeners on an address have not accepted.
func waiting(ctx context.Context, at target, out io.Writer) (status int, err error) {
	r, err := read(ctx, question{})
	if err != nil {
		return statusUnknown, err
	}
	var listeners []listener
	for l := range r.all {
		if at.takes(l.Queue) {
			listeners = append(listeners, *l)
		}
	}
	if len(listeners) == 0 {
		if _, err := fmt.Fprintf(out, "No socket of this network namespace listens on %v.\n", at); err != nil {
			return statusUnknown, err
		}
		return statusWarning, nil
	}
	for i, group := range groups(listeners) {
		// The kernel does not report in which queue of a group a client is.
		clients, err := group[0].Waiting(ctx)
		if ended := ctx.Err(); ended != nil {
			return statusUnknown, ended
		}
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return statusUnknown, err
		}
		text := waitingText(group, clients, err)
		if i > 0 {
			text = "\n" + text
		}
		if _, werr := io.WriteString(out, text); werr != nil {
			return statusUnknown, werr
		}
	}
	return statusOK, nil
}

// waitingText returns the clients of a group as text.
func waitingText(group []*listener, clients []acceptq.Waiting, err error) string {
	var text strings.Builder
	queued := 0
	for _, l := range group {
		queued += l.Stats.Queued
	}
	l := fullest(group)
	if len(group) == 1 {
		fmt.Fprintf(&text, "%s: %v\n", l.name(""), l.Stats)
	} else {
		fmt.Fprintf(&text, "%d sockets listen on %s: %d queued; the fullest: %v\n", len(group), l.address(), queued, l.Stats)
	}
	if err != nil {
		fmt.Fprintf(&text, "  The clients cannot be listed: %v.\n", err)
		return text.String()
	}
	if len(clients) == 0 && queued == 0 {
		text.WriteString("  No client waits.\n")
		return text.String()
	}
	gone := 0
	for _, c := range clients {
		wait, sent, more := "?", string(appendNumber(nil, c.Received))+" bytes", ""
		if c.Waited != unknown {
			wait = shortly(c.Waited)
		}
		if c.Closed {
			gone++
			more = "  closed, so it has probably given up"
		}
		if c.Shared && len(group) == 1 {
			more += "  perhaps in the queue of another listener on this port"
		}
		fmt.Fprintf(&text, "  %-24s  %8s  %12s%s\n", printable(c.Client.String()), wait, sent, more)
	}
	if gone > 0 {
		fmt.Fprintf(&text, "  %d of %s closed the connection.\n", gone, count(len(clients), "client has", "clients have"))
	}
	if missing := queued - len(clients); missing > 0 {
		fmt.Fprintf(&text, "  %s listed here: reset by the client, or changed meanwhile.\n",
			count(missing, "queued connection is not", "queued connections are not"))
	}
	return text.String()
}

// shortly returns a time with a precision that a reader needs.
func shortly(d time.Duration) string {
	if d >= 10*time.Second {
		return d.Round(time.Second).String()
	}
	return d.Round(10 * time.Millisecond).String()
}
