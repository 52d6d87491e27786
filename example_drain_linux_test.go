package acceptq_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/acceptq/acceptq"
)

// firstAnswers holds the connections that have not had an answer yet. Shutdown can close
// such a connection even if its request has arrived.
type firstAnswers struct{ pending sync.Map }

func (f *firstAnswers) connState(c net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		f.pending.Store(c, nil)
	case http.StateIdle, http.StateHijacked, http.StateClosed:
		f.pending.Delete(c)
	}
}

func (f *firstAnswers) wait(ctx context.Context) error {
	for {
		none := true
		f.pending.Range(func(any, any) bool { none = false; return false })
		if none {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

// Stop an HTTP server without losing a client: call Drain, wait until every connection
// has had its first answer, then call Shutdown.
func ExampleListener_Drain() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	var first firstAnswers
	srv := &http.Server{
		ConnState: first.connState,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "still served")
		}),
	}
	served := make(chan error)
	go func() { served <- srv.Serve(ln) }()

	// This client is in the accept queue and has not sent its request yet.
	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	answer := make(chan string)
	go func() {
		io.WriteString(client, "GET / HTTP/1.0\r\n\r\n")
		text, err := io.ReadAll(client)
		if err != nil {
			log.Fatal(err)
		}
		answer <- string(text[len(text)-len("still served"):])
	}()

	// Do this on SIGTERM. Each step has its own timeout, so a silent client does not
	// shorten the time of the requests that Shutdown waits for.
	for _, step := range []func(context.Context) error{ln.Drain, first.wait, srv.Shutdown} {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		if err := step(ctx); err != nil && !errors.Is(err, errors.ErrUnsupported) {
			log.Print(err) // continue in any case
		}
		cancel()
	}

	fmt.Println(<-answer)
	fmt.Println(<-served)
	// Output:
	// still served
	// http: Server closed
}
