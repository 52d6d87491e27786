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
	var clients []*keeper
	for i := range restartClients {
		k := newKeeper(protocol, i%2 == 1)
		defer k.CloseIdleConnections()
		clients = append(clients, k)
	}
	var t tally
	replace(b, 1, func() *exec.Cmd { return startWeb(b, nil, program, args) }, func(client int) { t.add(clients[client].ask(addr)) })
	t.report(b)
}

// A keeper is a client that can keep its connection.
type keeper struct {
	*http.Transport
	scheme  string
	retried atomic.Bool // the kernel retransmitted a SYN
}

func newKeeper(protocol string, keeps bool) *keeper {
	k := &keeper{Transport: &http.Transport{
		Protocols: new(http.Protocols), DisableKeepAlives: !keeps, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}, scheme: "http"}
	switch protocol {
	case web.H2C:
		k.Protocols.SetUnencryptedHTTP2(true)
	case web.H2TLS:
		k.Protocols.SetHTTP2(true)
		k.scheme = "https"
	default:
		k.Protocols.SetHTTP1(true)
	}
	// Only SYNs count: later the kernel also retransmits packets for which no client waits.
	k.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err == nil && resent(conn.(*net.TCPConn)) {
			k.retried.Store(true)
		}
		return conn, err
	}
	return k
}

// ask sends one request and reads its answer.
func (k *keeper) ask(addr string) exchange {
	err := post(k.Transport, k.scheme+"://"+addr)
	return exchange{err: err, retried: k.retried.Swap(false)}
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
