package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

// A tally is what the clients saw.
type tally struct {
	gap                        bool // nobody listens between two servers, so clients are refused
	ok, lost, refused, stalled atomic.Int64
	own                        atomic.Pointer[error] // the first failure that is no fault of a server
}

const (
	// stall is how long a client may wait without being called stalled. A dropped SYN is
	// sent again after a second.
	stall    = 900 * time.Millisecond
	patience = 20 * time.Second
)

func (t *tally) String() string {
	return fmt.Sprintf("%d answered, %d lost, %d refused, %d stalled above %v",
		t.ok.Load(), t.lost.Load(), t.refused.Load(), t.stalled.Load(), stall)
}

// more waits until n more requests were answered.
func (t *tally) more(ctx context.Context, n int) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	late := time.After(patience)
	for want := t.ok.Load() + int64(n); t.ok.Load() < want; {
		if err := t.own.Load(); err != nil {
			return fmt.Errorf("the clients fail, not the servers; use fewer: %w", *err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late:
			return fmt.Errorf("%d of %d requests were not answered within %v", want-t.ok.Load(), n, patience)
		case <-tick.C:
		}
	}
	return nil
}

// client sends one request after the other, over one connection for as long as the
// server keeps it, or each over a connection of its own.
func client(ctx context.Context, addr string, keepAlive bool, saw *tally) {
	tr := &http.Transport{DisableKeepAlives: !keepAlive}
	defer tr.CloseIdleConnections()
	for ctx.Err() == nil {
		began := time.Now()
		err := post(tr, addr)
		var op *net.OpError
		switch {
		case outOfResources(err):
			saw.own.CompareAndSwap(nil, &err)
			return
		case err == nil:
			saw.ok.Add(1)
			if time.Since(began) > stall {
				saw.stalled.Add(1)
			}
		case saw.gap && errors.As(err, &op) && op.Op == "dial" && !op.Timeout():
			saw.refused.Add(1)
			time.Sleep(time.Millisecond)
		default:
			saw.lost.Add(1)
		}
	}
}

// post sends a request that net/http does not repeat by itself: it cannot read the
// body again.
func post(tr *http.Transport, addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	const text = "hello"
	body := struct{ io.Reader }{strings.NewReader(text)}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+addr, body)
	if err != nil {
		return err
	}
	req.ContentLength = int64(len(text))
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err == nil && string(got) != text {
		err = fmt.Errorf("answer %q", got)
	}
	return err
}
