package acceptq_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptest"

	"github.com/acceptq/acceptq"
)

// A Listener is a net.Listener and can be used like one.
func ExampleListenTCP() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(64))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	go func() {
		conn, err := ln.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "welcome\n")
	}()

	client, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	text, err := io.ReadAll(client)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s", text)
	// Output: welcome
}

// A server that also works with a shorter queue starts anyway, and logs the setting
// that limits the queue.
func ExampleWithBacklog() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(64))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	account := ln.Backlog()
	if account.Clamped() {
		log.Print(account) // backlog: asked 64, granted 32, holds 33; net.core.somaxconn is 32: ...
	}
	fmt.Println("asked for", account.Requested)
	// Output: asked for 64
}

// A server that needs its queue length does not start with a shorter queue. The error
// says which setting to raise. (No kernel grants the largest int.)
func ExampleWithStrictBacklog() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(math.MaxInt), acceptq.WithStrictBacklog())
	if err == nil {
		defer ln.Close()
	}

	var clamp *acceptq.ClampError
	switch {
	case errors.As(err, &clamp) && clamp.Raise != "":
		log.Printf("the queue would be cut to %d, run: %s", clamp.Limit, clamp.Raise)
	case errors.Is(err, errors.ErrUnsupported):
		log.Print("this system does not tell how long its queue is")
	}
	fmt.Println("started:", err == nil)
	// Output: started: false
}

// Serve all numbers of the backlog on a diagnostic page. Unknown numbers are null. On a
// system that reports nothing, only the request is known.
func ExampleListener_Backlog() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0", acceptq.WithBacklog(64))
	if err != nil {
		log.Fatal(err)
	}
	defer ln.Close()

	mux := http.NewServeMux()
	mux.HandleFunc("/debug/backlog", func(w http.ResponseWriter, _ *http.Request) {
		json.NewEncoder(w).Encode(ln.Backlog())
	})

	page := httptest.NewRecorder()
	mux.ServeHTTP(page, httptest.NewRequest("GET", "/debug/backlog", nil))
	var account struct {
		Requested int
		Limit     *int
	}
	if err := json.Unmarshal(page.Body.Bytes(), &account); err != nil {
		log.Fatal(err)
	}
	fmt.Println("asked for", account.Requested)
	if account.Limit != nil && *account.Limit < 64 {
		log.Print("granted ", *account.Limit)
	}
	// Output: asked for 64
}
