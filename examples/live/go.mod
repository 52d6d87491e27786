module github.com/acceptq/acceptq/examples/live

go 1.26.0

replace github.com/acceptq/acceptq => ../..

require (
	github.com/acceptq/acceptq v0.0.0
	github.com/arl/statsviz v0.8.2
	github.com/chromedp/chromedp v0.23.0
	github.com/stretchr/testify v1.12.1
)

require (
	github.com/chromedp/cdproto v0.159.0 // indirect
	github.com/go-json-experiment/json v0.0.0-20260213210345-44df1a37e875 // indirect
	github.com/gorilla/websocket v1.5.3 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.49.0 // indirect
)
