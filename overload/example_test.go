package overload_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/acceptq/acceptq"
	"github.com/acceptq/acceptq/observe"
	"github.com/acceptq/acceptq/overload"
)

// A web server sheds clients that have waited for half a second. A health check on a
// port of its own says whether it still accepts. The queue is observed too, so that two
// functions want the field ConnContext: they are chained.
func Example() {
	ln, err := acceptq.ListenTCP("127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	queues := observe.NewSet(observe.Config{})
	api, err := queues.Add("api", ln)
	if err != nil {
		log.Fatal(err)
	}
	shed := overload.NewShedder(500 * time.Millisecond)
	srv := &http.Server{
		Handler: shed.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprint(w, "hello")
		})),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return shed.ConnContext(api.ConnContext(ctx, c), c)
		},
	}
	go srv.Serve(ln)
	defer srv.Close()

	admin, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/healthz", overload.Health(5*time.Second, ln))
	go http.Serve(admin, mux)
	defer admin.Close()

	for _, url := range []string{"http://" + ln.Addr().String(), "http://" + admin.Addr().String() + "/healthz"} {
		resp, err := http.Get(url)
		if err != nil {
			log.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		fmt.Println(resp.StatusCode, string(body))
	}
	http.DefaultClient.CloseIdleConnections()
	// Output:
	// 200 hello
	// 200 ok
}
