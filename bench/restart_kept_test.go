//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/acceptq/acceptq/bench/internal/alone/web"
)

// BenchmarkRestartKept replaces a server once while clients come, half of which keep
// their connection.
func BenchmarkRestartKept(b *testing.B) {
	dir := build(b)
	for _, protocol := range []string{web.HTTP1, web.H2TLS, web.H2C} {
		b.Run("protocol="+protocol, func(b *testing.B) {
			shuffled(b, restartsKept, nameOf, func(b *testing.B, c candidate) {
				restartKept(b, filepath.Join(dir, c.program), c, protocol)
			})
		})
	}
}

func restartKept(b *testing.B, program string, c candidate, protocol string) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	addr := ln.Addr().String()
	ln.Close()
	args := []string{addr, c.arg, protocol}
	var transports []*http.Transport
	var scheme string
	for i := range restartClients {
		var tr *http.Transport
		tr, scheme = transport(protocol)
		tr.DisableKeepAlives = i%2 == 0
		defer tr.CloseIdleConnections()
		transports = append(transports, tr)
	}
	var asked, lost, stalled atomic.Int64
	replace(b, func() *exec.Cmd { return startWeb(b, nil, program, args) }, func(client int) {
		began := time.Now()
		err := post(transports[client], scheme+"://"+addr)
		asked.Add(1)
		switch {
		case err != nil:
			lost.Add(1)
		case time.Since(began) > 900*time.Millisecond:
			stalled.Add(1)
		}
	})
	b.ReportMetric(float64(asked.Load()), "requests")
	b.ReportMetric(float64(lost.Load()), "lost")
	b.ReportMetric(float64(stalled.Load()), "stalled")
}

func transport(protocol string) (tr *http.Transport, scheme string) {
	tr = &http.Transport{Protocols: new(http.Protocols), TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	switch protocol {
	case web.H2C:
		tr.Protocols.SetUnencryptedHTTP2(true)
		return tr, "http"
	case web.H2TLS:
		tr.Protocols.SetHTTP2(true)
		return tr, "https"
	}
	tr.Protocols.SetHTTP1(true)
	return tr, "http"
}

// post sends a request that net/http does not repeat by itself: it cannot read the body
// again.
func post(tr *http.Transport, url string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, struct{ io.Reader }{strings.NewReader("x")})
	if err != nil {
		return err
	}
	req.ContentLength = 1
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && string(text) != string(httpAnswer) {
		err = fmt.Errorf("answer %q", text)
	}
	return err
}
