// For pages whose figures need nothing but drawing.
actome.start();
